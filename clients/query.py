"""Questions to the engine, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from penstock.actors.protocol import Adapters, Control, List, Listing, Report, Status
from penstock.clients.errors import PenstockError, from_wire

PROBE = 0  # the number of a question that nobody waits for, which asks for a sign of life, and whether what is open here is open there

Question = List | Status | Control | Adapters


class Query:
    """`message` is the question, asked at `since` (seconds, monotonic). `wake` is called when one of `answer` and `error` is set."""

    __slots__ = ("answer", "error", "message", "since", "wake")

    def __init__(self, message: Question, wake: Callable[[], None], now: float) -> None:
        self.message, self.wake, self.since = message, wake, now
        self.answer: Any = None
        self.error: PenstockError | None = None


class Queries:
    """Those that have no answer yet."""

    def __init__(self) -> None:
        self._open: dict[int, Query] = {}
        self._next = PROBE + 1

    def __iter__(self) -> Iterator[Query]:
        return iter(self._open.values())

    @property
    def orders(self) -> list[Query]:
        """Those that engines did not know from the first."""
        return [query for query in self if isinstance(query.message, Control | Adapters)]

    def add(self, question: Callable[[int], Question], wake: Callable[[], None], now: float) -> Query:
        """`question` makes the message, given its number."""
        query = self._open[self._next] = Query(question(self._next), wake, now)
        self._next += 1
        return query

    def answered(self, message: Listing | Report) -> Query | None:
        """The question, which now has this answer; None if nobody waits for it any more."""
        query = self._open.pop(message.query, None)
        if query is None:
            return None
        if isinstance(message, Listing):
            query.answer = message.requests
        elif "error" in message.report:
            query.error = from_wire(message.report["error"])
        else:
            query.answer = message.report
        return query

    def drop(self, query: Query) -> None:
        self._open = {number: one for number, one in self._open.items() if one is not query}
