"""Which adapters are on the device: who has which pages, whose turn it is to come, and who has to go for it. Pure decisions, no weights.

    absent ──wanted──▶ loading ──loaded──▶ ready ──────evicted─────▶ absent
                                             │  ▲ nobody waits any more
                                             ▼  │
                                          draining   nobody new is let in, and who runs yields after a while

An adapter is wanted while a stream of it is open and it has no pages. Those that are wanted come as soon as there are pages: free ones, or
those of adapters that no stream is open of. If there are not enough, and one has waited for a while, nobody overtakes it any more, and
those that were ready for long enough drain, the most served first. So more adapters than fit take turns, and none starves. The pages
of an adapter that streams are running with are nobody else's.

Priorities go first: nobody drains for a stream of a lower one. How the streams of adapters share slots is `engine.queue`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from penstock.engine.request import Adapter

PATIENCE_S = 0.1  # that one waits for pages before others drain for it
TURN_S = 1.0  # that an adapter is ready before it may have to drain
UNUSED_S = 5.0  # the same if its streams get no slot meanwhile: then the next one would hardly get any sooner
GRACE_S = 0.5  # for the streams of one that drains, to end by themselves
BASE = b""  # the digest of no adapter
LOWEST = -(2**31)  # below any priority


@dataclass(frozen=True, slots=True)
class Load:
    """Put an adapter into these pages. `number` counts the loads."""

    number: int
    adapter: Adapter
    pages: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Resident:
    """What is known of an adapter. `since`: when it began to be wanted, to be ready or to drain, whichever was last."""

    adapter: Adapter | None  # None: the base model
    served: int = 0  # tokens
    open: int = 0  # streams
    priorities: dict[int, int] = field(default_factory=dict)  # how many of each
    running: int = 0  # those of them that have a slot
    number: int = 0  # while some run: see `Residency.numbers`
    pages: tuple[int, ...] = ()
    load: int = 0  # the one that is under way
    ready: bool = False
    draining: bool = False
    pinned: bool = False
    since: float = 0.0
    left: int = 0  # when the last of its streams left a slot, in such events

    @property
    def priority(self) -> int:
        """The highest of its streams."""
        return max((priority for priority, count in self.priorities.items() if count), default=LOWEST)

    @property
    def state(self) -> str:
        """For people."""
        return "draining" if self.draining else "resident" if self.ready else "loading" if self.pages else "waiting"

    @property
    def idle(self) -> bool:
        return self.ready and not self.running and not self.pinned


class Residency:
    """`pages` pages, and at most `slots` streams that run."""

    __slots__ = ("_draining", "_events", "_free", "_known", "_loads", "_loads_begun", "_numbered", "_unused", "_wanted", "pages")

    def __init__(self, pages: int, slots: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._known = {BASE: Resident(None, ready=True, pinned=True)}
        self._wanted: OrderedDict[bytes, Resident] = OrderedDict()
        self._draining: list[Resident] = []
        self._loads: list[Load] = []
        self._loads_begun = self._events = 0
        self._numbered: list[Resident | None] = [self._known[BASE], *[None] * slots]
        self._unused = list(range(slots, 0, -1))

    # ── streams ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def fits(self, adapter: Adapter | None) -> bool:
        """Whether it can ever be here, beside what is pinned."""
        if adapter is None or ((one := self._known.get(adapter.digest)) is not None and one.pinned):
            return True
        return 0 < adapter.pages <= self.pages - self._pinned()

    def open(self, adapter: Adapter | None, priority: int, now: float) -> None:
        """There is one more stream of it."""
        one = self._known.get(digest_of(adapter))
        if one is None:
            one = self._known[digest_of(adapter)] = Resident(adapter)
        one.adapter = adapter  # it may lie elsewhere now
        one.open += 1
        one.priorities[priority] = one.priorities.get(priority, 0) + 1
        self._want(one, now)

    def close(self, adapter: Adapter | None, priority: int) -> None:
        """One of its streams, which has no slot, is no more."""
        one = self._known[digest_of(adapter)]
        one.open -= 1
        one.priorities[priority] -= 1
        self._forget(one)

    def can_run(self, digest: bytes) -> bool:
        """Whether a stream that waits for it can be let in now."""
        one = self._known[digest]
        return one.ready and not one.draining

    def enter(self, adapter: Adapter | None) -> tuple[int, tuple[int, ...]]:
        """A stream of it, which `can_run`, gets a slot. Returns its number among the adapters that run, and its pages."""
        one = self._known[digest_of(adapter)]
        if not one.running and one.adapter is not None:
            one.number = self._unused.pop()
            self._numbered[one.number] = one
        one.running += 1
        return one.number, one.pages

    def leave(self, adapter: Adapter | None) -> None:
        """One of its streams leaves its slot."""
        one = self._known[digest_of(adapter)]
        one.running -= 1
        self._events += 1
        one.left = self._events
        if not one.running and one.adapter is not None:
            self._numbered[one.number] = None
            self._unused.append(one.number)

    def charge(self, number: int, tokens: int) -> bytes:
        """Tokens were served to the streams that run with one. Returns its digest."""
        one = self._numbered[number]
        if one is None:
            return BASE
        one.served += tokens
        return digest_of(one.adapter)

    # ── pages ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> None:
        """Begin the loads for which there are pages, and decide who drains for the others."""
        for one in sorted(self._wanted.values(), key=lambda one: -one.priority):
            if one.adapter is not None and self._make_room(one.adapter.pages, now):
                self._begin(one, one.adapter)
            elif now - one.since >= PATIENCE_S:
                break
        if self._wanted:
            self._drain(now)
        else:
            for one in self._draining:
                one.draining, one.since = False, now
            self._draining.clear()

    def pin(self, adapter: Adapter, now: float) -> bool:
        """Have it here, and keep it, whether streams want it or not. False, and nothing is changed, if then some other one that is wanted
        could not be here any more."""
        one = self._known.get(adapter.digest)
        if one is None or not one.pinned:
            wanted = [other.adapter for other in self._known.values() if other is not one and other.open]
            others = [other.pages for other in wanted if other is not None]
            if self._pinned() + adapter.pages + max(others, default=0) > self.pages:
                return False
        if one is None:
            one = self._known[adapter.digest] = Resident(adapter)
        one.pinned = True
        if one.draining:
            one.draining = False
            self._draining.remove(one)
        self._want(one, now)
        return True

    def unpin(self, digest: bytes) -> None:
        """It may go again. One that is not pinned, or not known, stays as it is."""
        one = self._known.get(digest)
        if one is not None and one.adapter is not None:
            one.pinned = False
            self._forget(one)

    def take_loads(self) -> list[Load]:
        """Those that were begun since the last call."""
        loads, self._loads = self._loads, []
        return loads

    def loaded(self, number: int, now: float) -> None:
        """A load is done. One that is not known any more is ignored."""
        for one in self._known.values():
            if one.load == number and not one.ready:
                one.ready, one.since = True, now
                self._events += 1
                one.left = self._events

    def lost(self, number: int, now: float) -> bytes | None:
        """A load has failed. Returns which adapter has no pages now, and is not wanted until another stream of it is opened."""
        for digest, one in self._known.items():
            if one.load == number and not one.ready:
                self._free += one.pages
                one.pages, one.load = (), 0
                self._forget(one)
                return digest
        return None

    def yielding(self, now: float) -> set[bytes]:
        """Adapters that drain, and whose streams were given the time to end by themselves."""
        return {digest_of(one.adapter) for one in self._draining if one.running and now - one.since >= GRACE_S}

    def _want(self, one: Resident, now: float) -> None:
        if one.adapter is not None and not one.pages and one.adapter.digest not in self._wanted:
            self._wanted[one.adapter.digest], one.since = one, now

    def _begin(self, one: Resident, adapter: Adapter) -> None:
        del self._wanted[adapter.digest]
        self._loads_begun += 1
        one.pages, one.load = tuple([self._free.pop() for _ in range(adapter.pages)]), self._loads_begun
        self._loads.append(Load(one.load, adapter, one.pages))

    def _make_room(self, pages: int, now: float) -> bool:
        """Evict until so many pages are free, if that can be, the longest unused first."""
        if len(self._free) >= pages:
            return True
        idle = [one for one in self._known.values() if one.idle and (not one.open or one.draining)]
        if len(self._free) + sum(len(one.pages) for one in idle) < pages:
            return False
        for one in sorted(idle, key=lambda one: (one.open > 0, one.left)):
            if len(self._free) >= pages:
                break
            self._evict(one, now)
        return True

    def _evict(self, one: Resident, now: float) -> None:
        self._free += one.pages
        if one.draining:
            self._draining.remove(one)
        one.pages, one.load, one.ready, one.draining = (), 0, False, False
        if one.open:
            self._want(one, now)
        self._forget(one)

    def _forget(self, one: Resident) -> None:
        """If there is no more reason to know it."""
        if one.adapter is not None and not (one.open or one.pages or one.pinned):
            self._wanted.pop(one.adapter.digest, None)
            del self._known[one.adapter.digest]

    def _pinned(self) -> int:
        return sum(one.adapter.pages for one in self._known.values() if one.pinned and one.adapter is not None)

    def _drain(self, now: float) -> None:
        """As many as those need that have waited for long enough; of lower priorities first, and then the most served."""
        ready = [one for one in self._known.values() if one.ready and one.open and not one.pinned and not one.draining]
        had = [one for one in ready if now - one.since >= (TURN_S if one.running else UNUSED_S)]
        had.sort(key=lambda one: (one.priority, -one.served))
        there = len(self._free) + sum(len(one.pages) for one in self._known.values() if one.draining or (one.idle and not one.open))
        for wanted in sorted(self._wanted.values(), key=lambda one: -one.priority):
            if wanted.adapter is None or now - wanted.since < PATIENCE_S:
                continue
            while there < wanted.adapter.pages and had and had[0].priority <= wanted.priority:
                one = had.pop(0)
                one.draining, one.since = True, now
                self._draining.append(one)
                there += len(one.pages)
            there -= wanted.adapter.pages
            if there < 0:
                return

    def report(self) -> list[tuple[str, str, int, int, int]]:
        """Of each that is known: digest (hexadecimal), state, streams that run and that wait, tokens served."""
        return [
            (digest.hex(), one.state, one.running, one.open - one.running, one.served)
            for digest, one in self._known.items()
            if one.adapter is not None
        ]

    def check(self) -> None:
        """Raise `RuntimeError` if the books do not balance. For tests, and for an idle engine."""
        held = [page for one in self._known.values() for page in one.pages]
        if sorted([*held, *self._free]) != list(range(self.pages)):
            raise RuntimeError(f"pages are lost or double: {len(held)} held, {len(self._free)} free")
        for one in self._known.values():
            if not 0 <= one.running <= one.open or (one.running and not one.ready):
                raise RuntimeError(f"{one.running} of {one.open} streams run with an adapter that is {'' if one.ready else 'not '}ready")


def largest_adapter(pages: int) -> int:
    """Pages that an adapter may take at most, of `pages`, so that it can be here whatever is pinned."""
    return pages - most_pinned(pages)


def most_pinned(pages: int) -> int:
    """Pages that may be pinned, of `pages`."""
    return pages // 2


def digest_of(adapter: Adapter | None) -> bytes:
    return BASE if adapter is None else adapter.digest
