"""Which adapters are on the device: the books balance, nobody's pages are taken, and everybody's turn comes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.lora.residency import PATIENCE_S, TURN_S, Load, Residency, digest_of
from penstock.engine.request import Adapter

PAGES, SLOTS = 6, 4
ADAPTERS = tuple(Adapter(bytes([number]), pages) for number, pages in enumerate((1, 1, 2, 3, 6), 1))
WHICH = st.sampled_from((None, *ADAPTERS))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), WHICH),
        st.tuples(st.just("close"), st.integers(0, 40)),
        st.tuples(st.just("enter"), st.integers(0, 40)),
        st.tuples(st.just("leave"), st.integers(0, 40)),
        st.tuples(st.just("plan")),
        st.tuples(st.just("loaded"), st.integers(0, 9)),
        st.tuples(st.just("lost"), st.integers(0, 9)),
        st.tuples(st.just("pin"), st.sampled_from(ADAPTERS)),
        st.tuples(st.just("unpin"), st.sampled_from(ADAPTERS)),
        st.tuples(st.just("pass"), st.sampled_from([0.05, 0.3, 1.1])),
    ),
    max_size=120,
)


class World:
    """What a scheduler and an executor do with a residency, and what they then may rely on."""

    def __init__(self, pages: int = PAGES, slots: int = SLOTS) -> None:
        self.residency, self.slots, self.now = Residency(pages, slots), slots, 0.0
        self.waiting: list[Adapter | None] = []
        self.running: list[tuple[Adapter | None, tuple[int, ...]]] = []
        self.loads: list[Load] = []
        self.content: dict[int, bytes] = {}  # page → whose it is, once loaded
        self.served: Counter[Adapter | None] = Counter()

    def open(self, adapter: Adapter | None) -> None:
        if self.residency.fits(adapter):
            self.residency.open(adapter, 0, self.now)
            self.waiting.append(adapter)

    def close(self, at: int) -> None:
        self.residency.close(self.waiting.pop(at), 0)

    def enter(self, at: int) -> bool:
        adapter = self.waiting[at]
        if len(self.running) == self.slots or not self.residency.can_run(digest_of(adapter)):
            return False
        number, pages = self.residency.enter(adapter)
        assert (number == 0) == (adapter is None)
        assert len(pages) == (0 if adapter is None else adapter.pages)
        assert all(self.content[page] == adapter.digest for page in pages if adapter is not None)
        self.running.append((self.waiting.pop(at), pages))
        return True

    def leave(self, at: int) -> None:
        adapter, _ = self.running.pop(at)
        self.residency.leave(adapter)
        self.waiting.append(adapter)

    def plan(self) -> None:
        self.residency.plan(self.now)
        for load in self.residency.take_loads():
            for page in load.pages:
                assert page not in [other for _, pages in self.running for other in pages]
                assert page not in [other for flying in self.loads for other in flying.pages]
                self.content.pop(page, None)
            self.loads.append(load)

    def loaded(self, at: int) -> None:
        load = self.loads.pop(at)
        self.content |= dict.fromkeys(load.pages, load.adapter.digest)
        self.residency.loaded(load.number, self.now)

    def lost(self, at: int) -> None:
        digest = self.residency.lost(self.loads.pop(at).number, self.now)
        for adapter in [one for one in self.waiting if one is not None and one.digest == digest]:
            self.close(self.waiting.index(adapter))

    def step(self) -> None:
        """As a scheduler does it: who drains yields, the least served is let in first, and every stream that runs is served."""
        for adapter, pages in list(self.running):
            if adapter is not None and adapter.digest in self.residency.yielding(self.now):
                self.leave(self.running.index((adapter, pages)))
        self.plan()
        while self.loads:
            self.loaded(0)
        able = {at: self.served[one] for at, one in enumerate(self.waiting) if self.residency.can_run(digest_of(one))}
        for at in sorted(able, key=lambda at: (able[at], at)):
            if len(self.running) < self.slots:
                one = self.waiting[at]
                number, pages = self.residency.enter(one)
                self.residency.charge(number, 1)
                self.served[one] += 1
                self.running.append((one, pages))
                self.waiting[at] = self  # type: ignore[call-overload]  taken out below, so that places stay
        self.waiting = [one for one in self.waiting if one is not self]


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_pages_belong_to_one_adapter_and_are_never_taken_from_a_stream_that_runs(steps: list[tuple]) -> None:
    world = World()
    for kind, *args in steps:
        if kind == "open":
            world.open(*args)
        elif kind in ("close", "enter") and world.waiting:
            getattr(world, kind)(args[0] % len(world.waiting))
        elif kind == "leave" and world.running:
            world.leave(args[0] % len(world.running))
        elif kind == "plan":
            world.plan()
        elif kind in ("loaded", "lost") and world.loads:
            getattr(world, kind)(args[0] % len(world.loads))
        elif kind == "pin":
            world.residency.pin(*args, world.now)
        elif kind == "unpin":
            world.residency.unpin(args[0].digest)
        elif kind == "pass":
            world.now += args[0]
        world.residency.check()
    # Whatever was open gets its turn, and when all is over nothing but what is pinned is known.
    while world.loads:
        world.loaded(0)
    seen: Counter[Adapter | None] = Counter()
    wanted = set(world.waiting)
    for _ in range(400):
        world.now += 0.1
        if world.running and world.waiting:
            world.leave(0)  # streams end, and others of the same adapter begin: else those of the base model would keep their slots
        world.step()
        seen.update(adapter for adapter, _ in world.running)
    assert wanted <= seen.keys()


def test_more_adapters_than_fit_are_served_alike() -> None:
    """Twelve adapters of one page, four pages, each always with a stream: over time none has much less than the others."""
    world = World(pages=4, slots=4)
    adapters = [Adapter(bytes([number]), 1) for number in range(1, 13)]
    for adapter in adapters:
        world.open(adapter)
    served: Counter[Adapter | None] = Counter()
    for _ in range(6000):
        world.now += 0.01
        world.step()
        for adapter, _ in world.running:
            served[adapter] += 1
            world.residency.charge(world.residency._known[adapter.digest].number, 1)  # type: ignore[union-attr]
    assert min(served[adapter] for adapter in adapters) > 0.6 * max(served.values())


def test_whoever_has_waited_comes_before_an_adapter_that_was_just_there() -> None:
    world = World(pages=1, slots=2)
    first, second = ADAPTERS[:2]
    world.open(first)
    world.step()
    world.open(second)
    world.open(first)
    for _ in range(round((TURN_S + PATIENCE_S) / 0.1)):
        world.now += 0.1
        world.residency.plan(world.now)
    assert not world.residency.can_run(first.digest)  # it drains: its second stream is not let in before the other's first
    world.leave(0)
    world.step()
    assert [adapter for adapter, _ in world.running] == [second]


def test_an_adapter_that_nobody_wants_any_more_stays_until_its_pages_are_needed() -> None:
    world = World(pages=2)
    for adapter in (*ADAPTERS[:2], ADAPTERS[0]):
        world.open(adapter)
        world.step()
        world.leave(0)
        world.close(0)
    assert world.residency._loads_begun == 2
    world.open(ADAPTERS[2])
    world.step()
    assert len(world.running) == 1


def test_more_than_fit_cannot_be_pinned() -> None:
    world = World()
    one, other, two, three, all_pages = ADAPTERS
    world.open(three)
    assert world.residency.pin(two, 0.0)
    assert world.residency.pin(one, 0.0)
    assert not world.residency.pin(other, 0.0)  # the one that a stream is open of would never fit
    assert world.residency.fits(three)
    assert not world.residency.fits(all_pages)
    world.residency.unpin(two.digest)
    assert world.residency.pin(other, 0.0)


def test_nobody_drains_for_a_stream_of_a_lower_priority_and_the_highest_comes_first() -> None:
    residency = Residency(1, 4)
    high, low, highest = ADAPTERS[0], ADAPTERS[1], Adapter(b"highest", 1)
    residency.open(high, 5, 0.0)
    residency.plan(0.0)
    residency.loaded(residency.take_loads()[0].number, 0.0)
    residency.enter(high)
    residency.open(low, 0, 0.0)
    residency.plan(50.0)
    assert residency.can_run(high.digest)
    residency.open(highest, 6, 50.0)
    residency.plan(52.0)
    assert not residency.can_run(high.digest)
    residency.leave(high)
    residency.close(high, 5)
    residency.plan(52.1)
    assert [load.adapter for load in residency.take_loads()] == [highest]
