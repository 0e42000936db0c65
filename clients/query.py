"""A question to the engine, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.actors.protocol import Adapters, Control, List, Status
from penstock.clients.errors import PenstockError

Question = List | Status | Control | Adapters


class Query:
    """`message` is the question, asked at `since` (seconds, monotonic). `wake` is called when one of `answer` and `error` is set."""

    __slots__ = ("answer", "error", "message", "since", "wake")

    def __init__(self, message: Question, wake: Callable[[], None], now: float) -> None:
        self.message, self.wake, self.since = message, wake, now
        self.answer: Any = None
        self.error: PenstockError | None = None
