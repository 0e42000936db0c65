"""The queue against a naive one that looks at every entry each time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock.engine.queue as queue_module
from penstock.engine.queue import REMEMBERED, FairQueue


@dataclass(slots=True, eq=False)
class Entry:
    name: int
    tenant: str = "a"
    priority: int = 0
    gone: bool = False
    adapter: bytes = b""


EVERY = frozenset((b"", b"x", b"y"))  # adapters


class NaiveQueue:
    def __init__(self) -> None:
        self.lines: dict[tuple[int, str], list[Entry]] = {}
        self.served: dict[tuple[int, str], int] = {}
        self.turn: dict[int, int] = {}
        self.since: dict[tuple[int, str, bytes], int] = {}  # when the first one came of those that wait for an adapter
        self.adapted: dict[tuple[int, str, bytes], int] = {}

    def push(self, entry: Entry, front: bool) -> None:
        key = (entry.priority, entry.tenant)
        line = self.lines.setdefault(key, [])
        if not any(other.adapter == entry.adapter for other in line if not other.gone):
            self.since[*key, entry.adapter] = entry.name
            others = {other.adapter for other in line if not other.gone}
            least = min((self.adapted.get((*key, other), 0) for other in others), default=0)
            self.adapted[*key, entry.adapter] = max(self.adapted.get((*key, entry.adapter), 0), least)
        if not line or all(other.gone for other in line):
            live = [other for other, entries in self.lines.items() if other[0] == key[0] and not all(one.gone for one in entries)]
            least = min((self.served[other] for other in live), default=0)
            self.served[key] = max(self.served.get(key, 0), self.turn.get(entry.priority, 0), least)
        line.insert(0 if front else len(line), entry)

    def priorities(self) -> set[int]:
        return {priority for (priority, _), line in self.lines.items() if not all(entry.gone for entry in line)}

    def head(self, priority: int | None = None, able: frozenset[bytes] = EVERY) -> Entry | None:
        """At one priority, or any; of those whose adapter can run, the one that was served least, or else that has waited longest."""
        lines = {
            key: [entry for entry in line if not entry.gone and entry.adapter in able]
            for key, line in self.lines.items()
            if priority in (None, key[0])
        }
        waiting = [key for key, line in lines.items() if line]
        if not waiting:
            return None
        key = min(waiting, key=lambda key: (-key[0], self.served[key], key[1]))
        line = lines[key]
        best = min({entry.adapter for entry in line}, key=lambda adapter: (self.adapted.get((*key, adapter), 0), self.since[*key, adapter]))
        return next(entry for entry in line if entry.adapter == best)

    def pop(self, entry: Entry) -> None:
        self.turn[entry.priority] = self.served[entry.priority, entry.tenant]
        self.lines[entry.priority, entry.tenant].remove(entry)

    def charge(self, priority: int, tenant: str, tokens: int) -> None:
        key = (priority, tenant)
        self.served[key] = self.served.get(key, self.turn.get(priority, 0)) + tokens


TENANT, PRIORITY, ADAPTER = st.sampled_from("abc"), st.integers(-1, 1), st.sampled_from(sorted(EVERY))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), PRIORITY, TENANT, st.booleans(), ADAPTER),
        st.tuples(st.just("pop")),
        st.tuples(st.just("charge"), PRIORITY, TENANT, st.integers(1, 9)),
        st.tuples(st.just("adapt"), PRIORITY, TENANT, ADAPTER, st.integers(1, 9)),
        st.tuples(st.just("go"), st.integers(0, 30)),
    ),
    max_size=80,
)


@settings(max_examples=400, deadline=None)
@given(STEPS, st.booleans(), st.frozensets(ADAPTER))
def test_the_queue_serves_in_the_order_of_a_naive_queue(steps: list[tuple], sweeping: bool, able: frozenset[bytes]) -> None:
    queue: FairQueue[Entry] = FairQueue()
    naive, entries = NaiveQueue(), []
    for kind, *args in steps:
        if kind == "push":
            priority, tenant, front, adapter = args
            entries.append(Entry(len(entries), tenant, priority, adapter=adapter))
            if sweeping and naive.priorities() == set(queue._levels):  # a priority that nobody waits in would lose its counters
                queue._sweep()
            queue.push(entries[-1], front=front)
            naive.push(entries[-1], front)
        elif kind == "pop" and (head := naive.head()) is not None:
            assert queue.head() is head
            assert queue.pop(head) is head
            naive.pop(head)
        elif kind == "charge" and args[0] in queue._levels:
            queue.charge(*args)
            naive.charge(*args)
        elif kind == "adapt" and args[0] in queue._levels:
            queue.charge_adapter(*args)
            key = tuple(args[:3])
            naive.adapted[key] = naive.adapted.get(key, 0) + args[3]
        elif kind == "go" and entries:
            entries[args[0] % len(entries)].gone = True
        assert queue.head() is naive.head()
        assert queue.priorities() >= naive.priorities()
        for priority in (-1, 0, 1):
            assert queue.head_at(priority, able=able.__contains__) is naive.head(priority, able)
    while (head := naive.head()) is not None:
        assert queue.head() is head
        naive.pop(queue.pop(head))
    assert queue.head() is None
    assert not queue.priorities()


def drain(queue: FairQueue[Entry], count: int, cost: int = 1) -> list[str]:
    """Who is served by the next `count` pops."""
    served = []
    for _ in range(count):
        entry = queue.head()
        assert entry is not None
        queue.pop(entry)
        queue.charge(entry.priority, entry.tenant, cost)
        served.append(entry.tenant)
    return served


def test_an_entry_pushed_to_the_front_comes_before_its_tenants_others_only() -> None:
    queue: FairQueue[Entry] = FairQueue()
    for entry in (Entry(0, "b"), Entry(1, "a"), Entry(2, "a")):
        queue.push(entry)
    queue.push(front := Entry(3, "b"), front=True)
    assert drain(queue, 1) == ["a"]
    assert queue.head() is front


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 20))
def test_a_tenant_that_returns_from_idling_has_saved_nothing_up(alone: int, cost: int, entries: int) -> None:
    queue: FairQueue[Entry] = FairQueue()
    queue.push(Entry(-1, "b"))
    drain(queue, 1)
    for name in range(alone + entries):
        queue.push(Entry(name, "a"))
    drain(queue, alone, cost)
    for name in range(entries):
        queue.push(Entry(name, "b"))
    served = drain(queue, 2 * entries, cost)
    for length in range(1, len(served) + 1):
        assert abs(served[:length].count("a") - served[:length].count("b")) <= 2


def test_what_a_high_priority_was_served_does_not_decide_between_low_ones() -> None:
    queue: FairQueue[Entry] = FairQueue()
    for name in range(20):
        queue.push(Entry(name, "early"))
    for name in range(50):
        queue.push(Entry(name, "urgent", 1))
    drain(queue, 50, cost=100)
    for name in range(20):
        queue.push(Entry(name, "late"))
    assert sorted(drain(queue, 10)) == ["early"] * 5 + ["late"] * 5


def test_a_debt_is_remembered_while_its_tenant_is_away() -> None:
    queue: FairQueue[Entry] = FairQueue()
    queue.push(Entry(0, "a"))
    queue.push(Entry(1, "b"))
    drain(queue, 1, cost=10)
    for name in range(9):
        queue.push(Entry(name, "b"))
    queue.push(Entry(99, "a"))
    assert drain(queue, 11) == ["b"] * 10 + ["a"]


def test_entries_that_are_gone_are_dropped_even_where_nobody_gets_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "SWEEP", 16)
    queue: FairQueue[Entry] = FairQueue()
    queue._sweep_at = 16
    queue.push(Entry(0, "a", 1))
    live = Entry(1, "b")
    queue.push(live)
    for name in range(2, 1000):
        queue.push(Entry(name, "b", gone=True))
    assert sum(level.waiting for level in queue._levels.values()) <= 2 + 16
    urgent = queue.head()
    assert urgent is not None
    queue.pop(urgent)
    assert queue.head() is live


def test_tenants_and_priorities_that_came_once_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "SWEEP", 16)
    queue: FairQueue[Entry] = FairQueue()
    queue._sweep_at = 16
    queue.push(Entry(0, "waits", -1))
    for name in range(3 * REMEMBERED):
        queue.push(Entry(name, f"once {name}", name % 7 if name < 2000 else -1 if name % 2 else 2**31 - name))
        while (entry := queue.head()) is not None and entry.tenant != "waits":
            queue.pop(entry)
            queue.charge(entry.priority, entry.tenant, 5)
    assert len(queue._levels) <= 1 + 16
    assert sum(len(level.served) for level in queue._levels.values()) <= REMEMBERED + 1 + 2 * 16
