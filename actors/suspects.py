"""Which request kills the executor: found by bisection.

After each crash the scheduler names the streams that were in a launched step, the only ones that can have caused it. Whoever was there
twice in a row, without a token in between, is a suspect. Then half of the suspects go on, on trial, and everybody else waits for that
moment. If the executor dies again, the guilty one is on trial; once each on trial has had a token, it is among the others, and those who
were cleared go on beside them. One that was alone when the executor died is guilty. For n suspects that takes 2 crashes and at most
log2(n) + 2 more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
SUSPICIOUS = 2  # deaths in a row that make a suspect: one may be anybody's


class Suspects(Generic[T]):
    """`T` is a stream, compared by identity. It is told what happened, and says who must wait: see `holds`."""

    def __init__(self) -> None:
        self.trial: dict[T, int] = {}  # those on trial, and how many ids they have
        self._next: list[dict[T, int]] = []  # groups of suspects that wait for their trial, the next one last
        self._cleared: set[T] = set()
        self._waiting: dict[T, None] = {}  # all others, in order
        self._deaths: dict[T, tuple[int, int]] = {}  # in a row, and how many ids the stream had at the last

    def holds(self, one: T) -> bool:
        """Whether this stream must not be handed over now. If so, `cleared` or `forget` will return it, or `crashed` free it."""
        if not self.trial or one in self.trial or one in self._cleared:
            return False
        if not any(one in group for group in self._next):
            self._waiting[one] = None
        return True

    def crashed(self, present: Iterable[tuple[T, int]]) -> T | None:
        """The executor died with these streams in a launched step; with each, how many ids it has. Returns the guilty one, once it is
        found: it is forgotten. Everybody who is not held now is to be handed over again."""
        seen = dict(present)
        self._waiting, self._cleared = {}, set()
        if self.trial:
            tried = {one: ids for one, ids in seen.items() if self.trial.get(one) == ids}
            if len(self.trial) == len(tried) == len(seen) == 1:
                self._reset()
                return next(iter(tried))
            if tried:
                self._next.append({one: ids for one, ids in self.trial.items() if one not in tried})  # who had no turn yet
                self._try(tried)
            return None
        self._deaths = {one: (self._count(one, ids), ids) for one, ids in seen.items()}
        self._try({one: ids for one, (count, ids) in self._deaths.items() if count >= SUSPICIOUS})
        return None

    def cleared(self, count: Callable[[T], int]) -> list[T]:
        """Streams have moved: `count` says how many ids each has now. Returns whom to hand over because of that."""
        moved = [one for one, ids in self.trial.items() if count(one) != ids]
        for one in moved:
            del self.trial[one]
            self._cleared.add(one)
        return self._go_on() if moved and not self.trial else []

    def forget(self, one: T) -> list[T]:
        """A stream has ended. Returns whom to hand over because of that."""
        self._waiting.pop(one, None)
        self._deaths.pop(one, None)
        for group in self._next:
            group.pop(one, None)
        self._cleared.discard(one)
        return [] if self.trial.pop(one, None) is None or self.trial else self._go_on()

    def _count(self, one: T, ids: int) -> int:
        deaths, had = self._deaths.get(one, (0, ids))
        return deaths + 1 if had == ids else 1

    def _try(self, suspects: dict[T, int]) -> None:
        """Half of these are on trial now, and the others are next."""
        order = list(suspects)
        half = (len(order) + 1) // 2
        self.trial = {one: suspects[one] for one in order[:half]}
        self._next.append({one: suspects[one] for one in order[half:]})

    def _go_on(self) -> list[T]:
        while not self.trial and self._next:
            self._try(self._next.pop())
            if not self.trial:
                self._next.pop()
        if self.trial:
            return list(self.trial)
        free = list(self._waiting)
        self._reset()
        return free

    def _reset(self) -> None:
        self.trial, self._next, self._cleared, self._waiting, self._deaths = {}, [], set(), {}, {}
