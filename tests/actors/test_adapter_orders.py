"""What the adapters actor makes of orders that overtake each other, and of what it cannot have; nothing is fetched for real."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.actors import finding, preparing
from penstock.actors.actor import Peer
from penstock.actors.adapters import AdaptersActor
from penstock.actors.finding import Finder
from penstock.actors.library import Library, Title
from penstock.actors.messages import Find, Found, Leave, Managed, Pin
from penstock.actors.messages import Manage as Order
from penstock.actors.preparing import Preparer, Version, Wanted
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Limits, Settings
from penstock.actors.sources.named import allowed_sources
from penstock.actors.sources.source import Source
from penstock.engine.lora.recipe import Wish

PATIENCE_S = 10.0


class Sources(Preparer):
    """An adapter's digest is what its source, a folder, is said to have. Who asks for one with a gate waits until that is open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.content, self.pages = folder, dict[str, str](), dict[str, int]()
        self.limits = Limits()
        self.gates, self.asked = dict[str, threading.Event](), list[str]()

    def prepare(self, wanted: Wanted, known: Version | None) -> Version:
        place = wanted.source.place
        self.asked.append(place)
        content = self.content.get(place, place)
        if place in self.gates:
            self.gates[place].wait(PATIENCE_S)
        if not content:
            raise SourceError("not_found", f"{place}: nothing is there")
        file = self.folder / "ready"
        file.touch()
        return Version(content.encode().hex().ljust(64, "0"), self.pages.get(place, 1), 16, str(file))

    def recall(self, digest: str | None) -> Version | None:
        return None


class Desk(AdaptersActor):
    """The actor without its mail."""

    def __init__(self, folder: Path, titles: dict[str, Title] | None = None) -> None:
        self.sent: list[Any] = []
        self.errors: list[str] = []
        self.sources = Sources(folder)
        self.library = Library.__new__(Library)
        self.library.file, self.library.unsaved, self.library.titles = folder / "adapters.json", "", dict(titles or {})
        self.mail = SimpleNamespace(send=lambda key, message: self.sent.append(message))  # type: ignore[assignment]
        self.log = SimpleNamespace(warning=lambda *_, **__: None, error=lambda text, **_: self.errors.append(text))
        self.settings = Settings(allowed=allowed_sources(["/"]))
        self.facts, self.early, self.found, self.orders, self.ordered = {"pages": 64}, [], 0, 0, {}
        self.config, self.peers = SimpleNamespace(adapter_sources=()), {}  # type: ignore[assignment]
        self.handlers = {Find: self._find, Order: self._manage}
        self.finder = Finder(lambda: self.sources)
        self.pins = self._open_pins()

    def order(self, job: int, order: str, name: str, source: str | None = None) -> None:
        self._manage(Order(job, order, name, source, None))

    def find(self, job: int, name: str) -> None:
        self.library.titles.setdefault(name, Title(f"/{name}"))
        self._find(Find(job, Wish((name,)).to_wire(), None, None))

    def meet(self, *peers: Peer) -> None:
        before = self.peers
        self.peers = before | {(peer.kind, peer.index): peer for peer in peers}
        self.met(before)

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not done() and time.monotonic() < end:
            self.after()
            time.sleep(0.005)
        assert done()

    def answer(self, job: int) -> dict[str, Any] | None:
        """What came of an order: None if it was carried out, else the error."""
        self.until(lambda: any(isinstance(message, Managed) and message.job == job for message in self.sent))
        (message,) = [message for message in self.sent if isinstance(message, Managed) and message.job == job]
        error: dict[str, Any] | None = message.error
        return error

    @property
    def answered(self) -> list[int]:
        """The requests that were, in order."""
        return [message.job for message in self.sent if isinstance(message, Found)]

    @property
    def last_pin(self) -> Pin:
        return next(message for message in reversed(self.sent) if isinstance(message, Pin))

    @property
    def pinned(self) -> list[int]:
        """How many places each message to the scheduler had."""
        return [len(message.places) for message in self.sent if isinstance(message, Pin)]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_later_order_decides_however_long_an_earlier_one_takes(desk: Desk) -> None:
    gate = desk.sources.gates["/slow"] = threading.Event()
    desk.order(1, "load", "one", "/slow")
    desk.order(2, "load", "one", "/fast")
    assert desk.answer(2) is None
    gate.set()
    error = desk.answer(1)
    assert error is not None
    assert "later order" in error["message"]
    assert desk.library.titles["one"].source == "/fast"


def test_what_was_unloaded_does_not_come_back(desk: Desk) -> None:
    gate = desk.sources.gates["/slow"] = threading.Event()
    desk.order(1, "load", "one", "/fast")
    assert desk.answer(1) is None
    desk.order(2, "load", "one", "/slow")
    desk.order(3, "unload", "one")
    assert desk.answer(3) is None
    gate.set()
    assert desk.answer(2) is not None
    assert not desk.library.titles


def test_of_orders_that_are_over_nothing_is_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "MOST_KNOWN", 2)
    desk.sources.content["/gone"] = ""
    for job, (order, name) in enumerate([("load", "one"), ("load", "two"), ("load", "gone"), ("load", "gone"), ("list", "")]):
        desk.order(job, order, name, f"/{name}")
        assert (desk.answer(job) is None) == (name != "gone")
    rows = next(message.adapters for message in reversed(desk.sent) if isinstance(message, Managed))
    assert [(row["name"], row["state"]) for row in rows] == [("one", "host"), ("two", "host")], "an order takes nobody's place"
    desk.order(10, "unload", "one")
    assert not desk.ordered


def test_a_load_sees_what_is_there_when_it_is_ordered(desk: Desk) -> None:
    gate = desk.sources.gates["/place"] = threading.Event()
    desk.sources.content["/place"] = "old"
    desk.order(1, "load", "one", "/place")
    desk.until(lambda: len(desk.finder) == 1)
    time.sleep(0.05)  # by now it has looked
    desk.sources.content["/place"] = "new"
    desk.order(2, "load", "one", "/place")
    gate.set()
    assert desk.answer(2) is None
    desk.answer(1)
    version = desk.library.titles["one"].version
    assert version is not None
    assert bytes.fromhex(version).rstrip(b"\0") == b"new"


def test_a_pin_of_what_is_unloaded_meanwhile_fails(desk: Desk) -> None:
    gate = desk.sources.gates["/slow"] = threading.Event()
    desk.library.titles["one"] = Title("/slow")
    desk.order(1, "pin", "one")
    desk.order(2, "unload", "one")
    gate.set()
    error = desk.answer(1)
    assert error is not None
    assert error["code"] == "unknown_adapter"


@pytest.mark.parametrize(("pages", "fits"), [(3, True), (64, False)])
def test_what_is_pinned_is_what_the_name_stands_for_by_then(desk: Desk, pages: int, fits: bool) -> None:
    gate = desk.sources.gates["/small"] = threading.Event()
    desk.sources.pages["/large"] = pages
    desk.library.titles["one"] = Title("/small")
    desk.order(1, "pin", "one")
    desk.order(2, "load", "one", "/large")
    assert desk.answer(2) is None
    gate.set()
    assert (desk.answer(1) is None) == fits
    assert desk.library.titles["one"].source == "/large"
    assert desk.library.titles["one"].pinned == fits
    assert [pages for _, pages, _ in desk.last_pin.places] == ([pages] if fits else [])


def test_pins_are_told_as_far_as_they_are_known_and_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "FAILED_S", 0.0)
    desk = Desk(tmp_path, {name: Title(f"/{name}", pinned=True) for name in ("here", "late", "gone", "lost")})
    gates = {place: desk.sources.gates.setdefault(place, threading.Event()) for place in ("/late", "/gone", "/lost")}
    desk.sources.content |= {"/gone": "", "/lost": ""}
    desk.pins.hand_over()
    desk.until(lambda: desk.pinned == [0, 1])
    for count, place in enumerate(("/gone", "/late", "/lost")):
        gates[place].set()
        desk.until(lambda left=2 - count: len(desk.finder) == left)
    assert desk.pinned == [0, 1, 2]
    assert sorted(desk.sources.asked) == ["/gone", "/here", "/late", "/lost"]
    desk.pins.hand_over()
    desk.until(lambda: not len(desk.finder))
    assert desk.pinned == [0, 1, 2, 2]
    assert sorted(desk.sources.asked[4:]) == ["/gone", "/lost"]


def test_what_is_known_by_its_digest_only_is_kept_until_it_is_found(tmp_path: Path) -> None:
    digest = b"/one".ljust(32, b"\0")
    desk = Desk(tmp_path, {"one": Title("/one", pinned=True, versions=("ff" * 32, digest.hex())), "gone": Title("/gone", pinned=True)})
    desk.sources.content["/gone"] = ""
    gate = desk.sources.gates["/one"] = threading.Event()
    desk.meet(Peer("scheduler", 0, 1, "", True))
    assert (desk.last_pin.places, desk.last_pin.kept) == ((), (digest,))
    gate.set()
    desk.until(lambda: desk.pinned == [0, 1])
    assert (desk.last_pin.places[0][0], desk.last_pin.kept) == (digest, ())


def test_one_that_cannot_be_had_keeps_no_other_from_being_pinned(tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"here": Title("/here", pinned=True), "gone": Title("/gone", pinned=True), "more": Title("/more")})
    desk.sources.content["/gone"] = ""
    desk.pins.hand_over()
    desk.until(lambda: desk.pinned == [0, 1])
    desk.order(1, "pin", "more")
    assert desk.answer(1) is None
    assert desk.pinned[-1] == 2
    desk.order(2, "unpin", "here")
    assert desk.answer(2) is None
    assert desk.pinned[-1] == 1


def test_what_is_pinned_is_not_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "MOST_KNOWN", 4)
    desk.library.titles |= {"one": Title("/one"), "two": Title("/two")}
    desk.order(1, "pin", "one")
    assert desk.answer(1) is None
    for other in range(5):
        desk.finder.remember((str(other),), Version("00" * 32, 1, 1, "/"))
    desk.order(2, "pin", "two")
    assert desk.answer(2) is None
    desk.until(lambda: desk.pinned[-1:] == [2])


def test_merges_are_in_nobody_elses_way(desk: Desk) -> None:
    gate = threading.Event()

    def slow(_: Preparer) -> Version:
        gate.wait(PATIENCE_S)
        raise SourceError("not_found", "nothing is there")

    for number in range(50):
        desk.finder.ask((str(number),), slow, lambda *_: None, None, far=False, merged=True)
    desk.order(1, "load", "one", "/one")
    assert desk.answer(1) is None
    assert len(desk.finder) == 50
    gate.set()


def test_what_nobody_waits_for_is_not_begun(desk: Desk) -> None:
    gate, begun, told = threading.Event(), list[str](), list[int]()

    def work(name: str) -> Callable[[Preparer], Version]:
        def prepare(_: Preparer) -> Version:
            begun.append(name)
            gate.wait(PATIENCE_S)
            raise SourceError("not_found", "nothing is there")

        return prepare

    def ask(name: str, who: int) -> None:
        desk.finder.ask((name,), work(name), lambda *_: told.append(who), None, far=False, who=who)

    for number in range(finding.NEAR):
        ask(f"busy {number}", number)
    desk.until(lambda: len(begun) == finding.NEAR)
    ask("left", 100)
    ask("shared", 101)
    ask("shared", 102)
    ask("former", 103 + (7 << 32))
    for who in (0, 100, 101, 100):
        desk.finder.leave(who)
    desk.finder.leave_all(0)
    assert len(desk.finder) == finding.NEAR + 1
    gate.set()
    desk.until(lambda: not len(desk.finder))
    assert sorted(told) == [*range(1, finding.NEAR), 102]
    assert {"left", "former"}.isdisjoint(begun)
    ask("left", 104)
    desk.until(lambda: told[-1:] == [104])


def test_what_has_begun_for_nobody_stops_and_makes_room(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "GRACE_S", 0.0)
    told: list[tuple[int, bool]] = []

    def ready(_: Preparer) -> Version:
        return Version("00" * 32, 1, 1, "/")

    def slow(preparer: Preparer) -> Version:
        if preparer.limits.stop.wait(PATIENCE_S):
            raise SourceError("stopped", "nobody waits for it")
        return ready(preparer)

    def ask(name: str, work: Callable[[Preparer], Version], who: int) -> None:
        desk.finder.ask((name,), work, lambda version, _: told.append((who, version is not None)), None, far=True, who=who)

    for who in range(finding.FAR):
        ask(f"slow {who}", slow, who)
    ask("honest", ready, 100)
    for who in range(finding.FAR):
        desk.finder.leave(who)
    desk.after()
    ask("slow 0", ready, 101)
    begun = time.monotonic()
    desk.until(lambda: not len(desk.finder))
    assert time.monotonic() - begun < PATIENCE_S / 2
    assert sorted(told) == [(100, True), (101, True)], "and what was stopped is no failure of its source"
    assert desk.finder.counts == {"prepared": 2, "failed": 0}


def test_what_stops_stops_nothing_else_and_tells_nothing_new(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "GRACE_S", 0.0)
    gate, told = threading.Event(), dict[int, str]()

    def work(digest: str, waits: bool) -> Callable[[Preparer], Version]:
        def prepare(preparer: Preparer) -> Version:
            if waits:
                gate.wait(PATIENCE_S)
            if preparer.limits.stop.is_set() and digest != "old":
                raise SourceError("stopped", "nobody waits for it")
            return Version(digest, 1, 1, str(desk.sources.folder))

        return prepare

    def ask(name: str, who: int, digest: str, *, waits: bool, fresh: float | None = None) -> None:
        then = lambda version, _: told.update({who: version and version.digest})  # noqa: E731
        desk.finder.ask((name,), work(digest, waits), then, fresh, far=True, who=who)

    ask("one", 1, "old", waits=True)
    ask("other", 2, "other", waits=True)
    desk.finder.leave(1)
    desk.until(lambda: "one" not in {key[0] for key in desk.finder._tasks})
    ask("one", 3, "new", waits=False)
    desk.until(lambda: 3 in told)
    gate.set()
    desk.until(lambda: not len(desk.finder))
    ask("one", 4, "none", waits=False)
    assert told == {2: "other", 3: "new", 4: "new"}
    desk.finder.leave(3)  # it was answered


def test_who_leaves_stops_what_it_asked_for_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "GRACE_S", 0.0)
    gate, begun, told = threading.Event(), list[int](), dict[int, bool]()

    def ask(who: int) -> None:
        def work(preparer: Preparer) -> Version:
            begun.append(who)
            gate.wait(PATIENCE_S)
            if preparer.limits.stop.is_set():
                raise SourceError("stopped", "nobody waits for it")
            return Version("00" * 32, 1, 1, "/")

        desk.finder.ask((str(who),), work, lambda version, _: told.update({who: version is not None}), None, far=True, who=who)
        desk.until(lambda: who in begun)

    ask(1)
    ask(2)
    desk.finder.leave(2)
    desk.after()
    gate.set()
    desk.until(lambda: not len(desk.finder))
    assert told == {1: True}


def test_who_asks_again_soon_finds_what_has_begun(desk: Desk) -> None:
    gate = desk.sources.gates["/one"] = threading.Event()
    desk.meet(Peer("gateway", 0, 1, "", True))
    desk.find(1 << 32, "one")
    desk.until(lambda: desk.sources.asked == ["/one"])
    desk.meet(Peer("gateway", 0, 2, "", True))
    desk.find(2 << 32, "one")
    gate.set()
    desk.until(lambda: not len(desk.finder))
    assert desk.answered == [2 << 32]
    assert desk.sources.asked == ["/one"]


def test_who_came_first_is_served_first_and_what_cannot_be_opened_is_opened_again(tmp_path: Path) -> None:
    opened, served, told = [RuntimeError("not yet"), Sources(tmp_path)], list[str](), list[bool]()

    def open_next() -> Preparer:
        found = opened.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    desk = Desk(tmp_path)
    desk.finder = finding.Finder(open_next)

    def ask(name: str) -> None:
        def work(_: Preparer) -> Version:
            served.append(name)
            return Version("00" * 32, 1, 1, "/")

        desk.finder.ask((name,), work, lambda version, _: told.append(version is not None), 0.0, far=False, merged=True)

    ask("first")
    desk.until(lambda: not len(desk.finder))
    assert told == [False]
    for number in range(3 * finding.MERGED):
        ask(str(number))
    desk.until(lambda: not len(desk.finder))
    assert told == [False] + [True] * 3 * finding.MERGED
    assert sorted(served[: finding.MERGED]) == [str(number) for number in range(finding.MERGED)]
    assert sorted(served[-finding.MERGED :]) == [str(number) for number in range(2 * finding.MERGED, 3 * finding.MERGED)]


def test_each_token_is_asked_for_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, probed = threading.Event(), list[str | None]()

    def probe(source: Source, token: str | None, limits: Limits, settings: Settings) -> str:
        probed.append(token)
        gate.wait(PATIENCE_S)
        if token != "good":
            raise SourceError("not_allowed", f"{source.shown}: no")
        return "1"

    monkeypatch.setattr(preparing, "probe", probe)
    desk = Desk(tmp_path, {"mine": Title("org/name@main")})
    for job, token in ((1, "good"), (2, "bad"), (3, "good")):
        desk._find(Find(job, Wish(("mine",)).to_wire(), token, None))
    gate.set()
    desk.until(lambda: not len(desk.finder))
    desk._find(Find(4, Wish(("mine",)).to_wire(), "good", None))  # after another's failure
    desk.until(lambda: not len(desk.finder))
    found = {message.job: message.error is None for message in desk.sent if isinstance(message, Found)}
    assert found == {1: True, 2: False, 3: True, 4: True}
    assert sorted(filter(None, probed)) == ["bad", "good", "good"]


def test_pins_that_are_not_known_any_more_count_and_are_asked_for_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.sources.pages |= {"/one": 20, "/two": 20}
    for job, name in enumerate(("one", "two")):
        desk.order(2 * job, "load", name, f"/{name}")
        assert desk.answer(2 * job) is None
    desk.order(9, "pin", "one")
    assert desk.answer(9) is None
    desk.finder._versions.clear()
    gate = desk.sources.gates["/one"] = threading.Event()
    desk.order(10, "pin", "two")
    error = desk.answer(10)
    assert error is not None
    assert "20 pages are pinned" in error["message"]
    gate.set()
    for job in (11, 12):
        desk.order(job, "unpin", "two")
        desk.until(lambda: desk.pinned[-1] == 1)
        desk.finder._versions.clear()


def test_what_is_left_or_done_is_not_kept(desk: Desk) -> None:
    gate, kept = threading.Event(), list[weakref.ref[Any]]()

    def ask(who: int) -> None:
        def work(_: Preparer) -> Version:
            gate.wait(PATIENCE_S)
            return Version("00" * 32, 1, 1, "/")

        kept.append(weakref.ref(work))
        desk.finder.ask((str(who),), work, lambda *_: None, None, far=False, who=who)

    for who in range(2 * finding.NEAR):
        ask(who)
    for who in range(finding.NEAR, 2 * finding.NEAR):
        desk.finder.leave(who)
    assert [one() is None for one in kept] == [False] * finding.NEAR + [True] * finding.NEAR
    gate.set()
    desk.until(lambda: not len(desk.finder))
    desk.until(lambda: all(one() is None for one in kept))


def test_a_request_that_is_left_is_not_answered(desk: Desk) -> None:
    gate = desk.sources.gates["/one"] = threading.Event()
    desk.find(1, "one")
    desk.find(2, "one")
    desk._leave(Leave(1))
    gate.set()
    desk.until(lambda: not len(desk.finder))
    assert desk.answered == [2]


def test_what_a_former_gateway_asked_for_is_not_answered_to_the_next_one(desk: Desk) -> None:
    gate = desk.sources.gates["/one"] = threading.Event()
    desk.meet(Peer("gateway", 0, 1, "", True))
    desk.find(1 << 32, "one")
    desk.meet(Peer("gateway", 0, 2, "", True))
    desk.find(2 << 32, "one")
    gate.set()
    desk.until(lambda: not len(desk.finder))
    assert desk.answered == [2 << 32]


def test_what_is_asked_for_too_early_begins_later_if_somebody_still_waits(desk: Desk) -> None:
    desk.facts = {}
    desk.meet(Peer("gateway", 0, 1, "", True))
    desk.find(1 << 32, "one")
    desk.order(1 << 32, "load", "kept", "/kept")
    desk.meet(Peer("gateway", 0, 2, "", True))
    desk.find(2 << 32, "one")
    desk.find((2 << 32) + 1, "one")
    desk._leave(Leave(2 << 32))
    assert not len(desk.finder)
    desk.meet(Peer("executor", 0, 3, "", True, {"adapters": {"pages": 64}}))
    assert desk.answer(1 << 32) is None, "an order holds, whoever is told of it"
    desk.until(lambda: not len(desk.finder))
    assert desk.answered == [(2 << 32) + 1]


def test_a_name_that_cannot_be_written_down_holds_all_the_same(desk: Desk) -> None:
    desk.library.file = Path("/proc/nowhere/adapters.json")
    desk.order(1, "load", "one", "/one")
    assert desk.answer(1) is None
    assert desk.library.titles["one"].source == "/one"
    assert desk.errors


def test_a_name_does_not_stand_for_what_its_source_has_now(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.order(1, "load", "one", "/place")
    assert desk.answer(1) is None
    (tmp_path / "ready").unlink()
    desk.sources.content["/place"] = "edited"
    desk.order(2, "pin", "one")
    error = desk.answer(2)
    assert error is not None
    assert error["limit"] == "changed_adapter"
    assert "no longer on this machine" in error["message"]
    desk.order(3, "load", "one")
    assert desk.answer(3) is None
    desk.order(4, "pin", "one")
    assert desk.answer(4) is None
