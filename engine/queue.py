"""Who is next: priorities first, then equal shares of tokens between tenants, of each tenant between its adapters, then order of arrival.

Shares follow the virtual token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Within a priority
each tenant has a counter of the tokens served to it, and the smallest counter goes first. Tokens are those that were computed or
sampled: what a prompt finds in the prefix cache is free, and what was preempted is paid for twice. A tenant that comes back from idling
is lifted to the smallest counter of those who wait or are served, so that it cannot save up. Priorities do not share counters: whatever
a high one was served says nothing about whose turn it is among those who waited meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
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
Able = Callable[[bytes], bool]  # of an adapter: whether who waits for it can run now


def every(_: bytes) -> bool:
    return True


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
        level.lift(line, entry)
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
        """The entry that is next, left in the queue, when every adapter can run."""
        while self._active:
            priority = max(self._active)
            entry = self._active[priority].head()
            if entry is not None:
                return entry
            del self._active[priority]
        return None

    def head_at(self, priority: int, without: Collection[str] = (), able: Able = every) -> W | None:
        """The entry that is next at this priority, when the tenants `without` do not count, nor those who wait for an adapter that is not
        `able`."""
        level = self._active.get(priority)
        return level.head(without, able) if level is not None else None

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

    def charge_adapter(self, priority: int, tenant: str, adapter: bytes, tokens: int) -> None:
        """So many of a tenant's tokens were served with this adapter. Of who uses one only, nothing need be counted."""
        level = self._levels.get(priority)
        if level is not None:
            level.adapted[tenant, adapter] = level.adapted.pop((tenant, adapter), 0) + tokens

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

    __slots__ = ("adapted", "heap", "lines", "served", "turn")

    def __init__(self) -> None:
        self.lines: dict[str, Line[W]] = {}  # by tenant
        self.heap: list[tuple[int, str]] = []  # (counter when pushed, tenant) of each line; counters only grow
        self.served: dict[str, int] = {}
        self.adapted: dict[tuple[str, bytes], int] = {}  # the same for each adapter of a tenant
        self.turn = 0  # the smallest counter of a line when one was served last; no line has a smaller one

    @property
    def waiting(self) -> int:
        return sum(line.waiting for line in self.lines.values())

    def lift(self, line: Line[W] | None, entry: W) -> None:
        """Somebody comes for an adapter that none of its tenant's waits for: nobody can save up."""
        if line is None or not line.waits_for(entry.adapter):
            key, others = (entry.tenant, entry.adapter), [] if line is None else list(line.queues)
            least = min((self.adapted.get((entry.tenant, other), 0) for other in others), default=0)
            if least > self.adapted.get(key, 0):
                self.adapted[key] = least

    def head(self, without: Collection[str] = (), able: Able = every) -> W | None:
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
            elif tenant in without or (found := line.head(tenant, self.adapted, able)) is None:
                aside.append(heappop(self.heap))
        for entry in aside:
            heappush(self.heap, entry)
        return found

    def sweep(self) -> None:
        for line in self.lines.values():
            line.sweep()
        self.lines = {tenant: line for tenant, line in self.lines.items() if line.queues}
        recent = set(list(self.served)[-REMEMBERED:])
        fresh = set(list(self.adapted)[-REMEMBERED:])
        there = {(tenant, adapter) for tenant, line in self.lines.items() for adapter in line.queues}
        self.adapted = {key: served for key, served in self.adapted.items() if key in there or key in fresh}
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

    def head(self, tenant: str, served: Mapping[tuple[str, bytes], int], able: Able) -> W | None:
        """The first of the adapter that was served least; None if nobody can run."""
        found: W | None = None
        least = 0
        for adapter in list(self.queues):
            queue = self._queue(adapter)
            if queue and able(adapter) and (found is None or served.get((tenant, adapter), 0) < least):
                found, least = queue[0], served.get((tenant, adapter), 0)
        return found

    def waits_for(self, adapter: bytes) -> bool:
        return self._queue(adapter) is not None

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
