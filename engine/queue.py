"""Who is next: priorities first, then equal shares of tokens between tenants, then order of arrival.

Shares follow the virtual token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
counter of the tokens served to it, the smallest counter goes first, and a tenant that comes back from idling is lifted to the
counter last served, so that it cannot save up.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Generic, Protocol, TypeVar


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
    __slots__ = ("_heaps", "_lines", "_served", "_virtual_time", "waiting")

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], deque[W]] = {}  # (priority, tenant) → who came first
        self._heaps: dict[int, list[tuple[int, str]]] = {}  # priority → (counter when pushed, tenant); counters only grow
        self._served: dict[str, int] = {}
        self._virtual_time = 0
        self.waiting = 0  # entries, gone ones included until they are met

    def push(self, entry: W, *, front: bool = False) -> None:
        """Queue an entry; `front` puts it before its tenant's others of the same priority (it was running already)."""
        key = (entry.priority, entry.tenant)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = deque()
            self._served[entry.tenant] = max(self._served.get(entry.tenant, 0), self._virtual_time)
            heapq.heappush(self._heaps.setdefault(entry.priority, []), (self._served[entry.tenant], entry.tenant))
        if front:
            line.appendleft(entry)
        else:
            line.append(entry)
        self.waiting += 1

    def head(self) -> W | None:
        """The entry that is next, left in the queue."""
        while self._heaps:
            priority = max(self._heaps)
            heap = self._heaps[priority]
            while heap:
                counter, tenant = heap[0]
                line = self._lines[priority, tenant]
                while line and line[0].gone:
                    line.popleft()
                    self.waiting -= 1
                if not line:
                    del self._lines[priority, tenant]
                    heapq.heappop(heap)
                elif counter != self._served[tenant]:
                    heapq.heapreplace(heap, (self._served[tenant], tenant))
                else:
                    return line[0]
            del self._heaps[priority]
        return None

    def pop(self) -> W:
        """Take the entry that `head` just returned."""
        heap = self._heaps[max(self._heaps)]
        self._virtual_time = max(self._virtual_time, heap[0][0])
        entry = self._lines[max(self._heaps), heap[0][1]].popleft()
        self.waiting -= 1
        return entry

    def charge(self, tenant: str, tokens: int) -> None:
        """`tokens` were served to a tenant."""
        self._served[tenant] = self._served.get(tenant, self._virtual_time) + tokens

    def forget_idle(self, busy: set[str]) -> None:
        """Drop the counters of tenants that are neither queued nor `busy`, once they have no advantage or debt left to remember."""
        queued = {tenant for _, tenant in self._lines}
        for tenant in [t for t, served in self._served.items() if t not in busy and t not in queued and served <= self._virtual_time]:
            del self._served[tenant]
