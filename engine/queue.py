"""Who is next: priorities first, then equal shares of tokens between tenants, of each tenant between its adapters, then order of arrival.

Shares follow the virtual token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Within a priority
each tenant has a counter of the tokens served to it, and the smallest counter goes first. Tokens are those that were computed or
sampled: what a prompt finds in the prefix cache is free, and what was preempted is paid for twice. A tenant that comes back from idling
is lifted to the smallest counter of those who wait or are served, so that it cannot save up. Priorities do not share counters: whatever
a high one was served says nothing about whose turn it is among those who waited meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, Protocol, TypeVar

REMEMBERED = 1024  # tenants a priority, besides the queued ones, whose counters outlive a sweep
SWEEP = 4096  # pushes, at least, between two sweeps


class Waiting(Protocol):
    """What the queue needs to know of an entry. An entry with `gone` set is skipped: removal costs nothing."""

    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def adapter(self) -> bytes: ...
    @property
    def gone(self) -> bool: ...


W = TypeVar("W", bound=Waiting)
Rank = Callable[[bytes], int | None]  # of an adapter: tokens that it was served; None: who waits for it cannot run now


def alike(_: bytes) -> int:
    """A `Rank`: adapters make no difference."""
    return 0


class FairQueue(Generic[W]):
    __slots__ = ("_active", "_levels", "_pushes", "_sweep_at")

    def __init__(self) -> None:
        self._levels: dict[int, Level[W]] = {}  # by priority
        self._active: dict[int, Level[W]] = {}  # those of them with someone in line
        self._pushes, self._sweep_at = 0, SWEEP

    def priorities(self) -> set[int]:
        """Where someone may be waiting."""
        return set(self._active)

    def push(self, entry: W, *, front: bool = False, floor: int = 0) -> None:
        """Queue an entry; `front` puts it before its tenant's others of the same priority (it was running already). `floor` is the smallest
        counter of those who are being served, 0 if nobody is: who comes is lifted to the smallest one of all."""
        self._pushes += 1
        if self._pushes >= self._sweep_at:
            self._sweep()
        level = self._active[entry.priority] = self._levels.get(entry.priority) or Level()
        self._levels[entry.priority] = level
        if level.head() is not None:
            floor = min(floor, level.heap[0][0]) if floor else level.heap[0][0]
        line = level.lines.get(entry.tenant)
        if line is None or line.empty():
            counter = level.served[entry.tenant] = max(level.served.get(entry.tenant, 0), level.turn, floor)
        if line is None:
            line = level.lines[entry.tenant] = Line()
            heappush(level.heap, (counter, entry.tenant))
        line.push(entry, front=front)

    def tenants(self, priority: int) -> Collection[str]:
        """Who may be waiting there."""
        level = self._active.get(priority)
        return level.lines.keys() if level is not None else ()

    def served(self, priority: int, tenant: str) -> int:
        """The counter of a tenant: its tokens, and those that it was lifted by."""
        level = self._levels.get(priority)
        return level.served.get(tenant, level.turn) if level is not None else 0

    def head(self) -> W | None:
        """The entry that is next, left in the queue, when adapters make no difference."""
        while self._active:
            priority = max(self._active)
            entry = self._active[priority].head()
            if entry is not None:
                return entry
            del self._active[priority]
        return None

    def head_at(self, priority: int, without: Collection[str] = (), rank: Rank = alike) -> W | None:
        """The entry that is next at this priority, when the tenants `without` do not count."""
        level = self._active.get(priority)
        return level.head(without, rank) if level is not None else None

    def pop(self, entry: W) -> W:
        """Take an entry out that is waiting: one that `head` or `head_at` returned."""
        level = self._active[entry.priority]
        level.turn = level.heap[0][0]
        level.lines[entry.tenant].remove(entry)
        return entry

    def charge(self, priority: int, tenant: str, tokens: int) -> None:
        """`tokens` were served to a tenant, at this priority."""
        level = self._levels.get(priority)
        if level is not None:
            level.served[tenant] = level.served.pop(tenant, level.turn) + tokens  # moved to the end: the order is that of service

    def _sweep(self) -> None:
        """Drop what is gone but was not met, and counters that nobody is compared with; often enough to bound both, seldom enough to
        cost nothing."""
        for level in self._levels.values():
            level.sweep()
        self._active = {priority: level for priority, level in self._levels.items() if level.lines}
        self._levels = dict(self._active)
        self._pushes, self._sweep_at = 0, max(SWEEP, sum(level.waiting for level in self._levels.values()))


class Level(Generic[W]):
    """One priority."""

    __slots__ = ("heap", "lines", "served", "turn")

    def __init__(self) -> None:
        self.lines: dict[str, Line[W]] = {}  # by tenant
        self.heap: list[tuple[int, str]] = []  # (counter when pushed, tenant) of each line; counters only grow
        self.served: dict[str, int] = {}
        self.turn = 0  # the smallest counter of a line when one was served last; no line has a smaller one

    @property
    def waiting(self) -> int:
        return sum(line.waiting for line in self.lines.values())

    def head(self, without: Collection[str] = (), rank: Rank = alike) -> W | None:
        aside: list[tuple[int, str]] = []
        found: W | None = None
        while self.heap and found is None:
            counter, tenant = self.heap[0]
            line = self.lines[tenant]
            if line.empty():
                del self.lines[tenant]
                heappop(self.heap)
            elif counter != self.served[tenant]:
                heapreplace(self.heap, (self.served[tenant], tenant))
            elif tenant in without or (found := line.head(rank)) is None:
                aside.append(heappop(self.heap))
        for entry in aside:
            heappush(self.heap, entry)
        return found

    def sweep(self) -> None:
        for line in self.lines.values():
            line.sweep()
        self.lines = {tenant: line for tenant, line in self.lines.items() if line.queues}
        recent = set(list(self.served)[-REMEMBERED:])
        self.served = {tenant: served for tenant, served in self.served.items() if tenant in self.lines or tenant in recent}
        self.heap = [(self.served[tenant], tenant) for tenant in self.lines]
        heapify(self.heap)


class Line(Generic[W]):
    """One tenant: for each adapter, in the order in which they came, those who wait for it, in the order in which they did."""

    __slots__ = ("queues",)

    def __init__(self) -> None:
        self.queues: dict[bytes, deque[W]] = {}

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    def push(self, entry: W, *, front: bool) -> None:
        queue = self._queue(entry.adapter)
        if queue is None:
            queue = self.queues[entry.adapter] = deque()
        if front:
            queue.appendleft(entry)
        else:
            queue.append(entry)

    def empty(self) -> bool:
        """Whether nobody waits."""
        return not any(self._queue(adapter) for adapter in list(self.queues))

    def head(self, rank: Rank) -> W | None:
        """The first of the adapter that was served least; None if nobody can run."""
        found: W | None = None
        least = 0
        for adapter in list(self.queues):
            queue = self._queue(adapter)
            if queue and (served := rank(adapter)) is not None and (found is None or served < least):
                found, least = queue[0], served
        return found

    def _queue(self, adapter: bytes) -> deque[W] | None:
        """Who waits for an adapter; whoever is gone is dropped on the way."""
        queue = self.queues.get(adapter)
        while queue and queue[0].gone:
            queue.popleft()
        if queue is not None and not queue:
            del self.queues[adapter]
            return None
        return queue

    def remove(self, entry: W) -> None:
        self.queues[entry.adapter].remove(entry)

    def sweep(self) -> None:
        """Drop whoever is gone."""
        queues = {adapter: deque(entry for entry in queue if not entry.gone) for adapter, queue in self.queues.items()}
        self.queues = {adapter: queue for adapter, queue in queues.items() if queue}
