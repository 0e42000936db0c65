"""Who is next: priorities first, then equal shares of tokens between tenants, then order of arrival.

Shares follow the virtual token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Within a priority
each tenant has a counter of the tokens served to it, and the smallest counter goes first. Tokens are those that were computed or
sampled: what a prompt finds in the prefix cache is free, and what was preempted is paid for twice. A tenant that comes back from idling
is lifted to the smallest counter of those who wait or are served, so that it cannot save up. Priorities do not share counters: whatever
a high one was served says nothing about whose turn it is among those who waited meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
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
    def gone(self) -> bool: ...


W = TypeVar("W", bound=Waiting)


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
        while line and line[0].gone:
            line.popleft()
        if not line:
            counter = level.served[entry.tenant] = max(level.served.get(entry.tenant, 0), level.turn, floor)
        if line is None:
            line = level.lines[entry.tenant] = deque()
            heappush(level.heap, (counter, entry.tenant))
        if front:
            line.appendleft(entry)
        else:
            line.append(entry)

    def tenants(self, priority: int) -> Collection[str]:
        """Who may be waiting there."""
        level = self._active.get(priority)
        return level.lines.keys() if level is not None else ()

    def served(self, priority: int, tenant: str) -> int:
        """The counter of a tenant: its tokens, and those that it was lifted by."""
        level = self._levels.get(priority)
        return level.served.get(tenant, level.turn) if level is not None else 0

    def head(self) -> W | None:
        """The entry that is next, left in the queue."""
        while self._active:
            priority = max(self._active)
            entry = self._active[priority].head()
            if entry is not None:
                return entry
            del self._active[priority]
        return None

    def head_at(self, priority: int, without: Collection[str] = ()) -> W | None:
        """The entry that is next at this priority, when the tenants `without` do not count."""
        level = self._active.get(priority)
        return level.head(without) if level is not None else None

    def pop(self, entry: W) -> W:
        """Take an entry out that is waiting: its tenant's first, or one that was when `head` or `head_at` returned it."""
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
        self.lines: dict[str, deque[W]] = {}  # tenant → who came first
        self.heap: list[tuple[int, str]] = []  # (counter when pushed, tenant) of each line; counters only grow
        self.served: dict[str, int] = {}
        self.turn = 0  # the smallest counter of a line when one was served last; no line has a smaller one

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self.lines.values())

    def head(self, without: Collection[str] = ()) -> W | None:
        aside: list[tuple[int, str]] = []
        found: W | None = None
        while self.heap and found is None:
            counter, tenant = self.heap[0]
            line = self.lines[tenant]
            while line and line[0].gone:
                line.popleft()
            if not line:
                del self.lines[tenant]
                heappop(self.heap)
            elif counter != self.served[tenant]:
                heapreplace(self.heap, (self.served[tenant], tenant))
            elif tenant in without:
                aside.append(heappop(self.heap))
            else:
                found = line[0]
        for entry in aside:
            heappush(self.heap, entry)
        return found

    def sweep(self) -> None:
        lines = {tenant: deque(entry for entry in line if not entry.gone) for tenant, line in self.lines.items()}
        self.lines = {tenant: line for tenant, line in lines.items() if line}
        recent = set(list(self.served)[-REMEMBERED:])
        self.served = {tenant: served for tenant, served in self.served.items() if tenant in self.lines or tenant in recent}
        self.heap = [(self.served[tenant], tenant) for tenant in self.lines]
        heapify(self.heap)
