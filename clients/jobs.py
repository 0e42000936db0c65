"""What `map` knows of one prompt: how to ask for it, and when to ask again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.actors.protocol import Generate
from penstock.clients.errors import LeaseExpired, Overloaded, PenstockError, Unavailable
from penstock.clients.inbox import Inbox
from penstock.clients.order import build
from penstock.clients.values import Outcome

AHEAD = 4  # times `concurrency`: prompts begun, or finished out of order, before the next one in order is handed out
_LONGEST_WAIT = 10.0  # seconds


class Job:
    """One prompt of `map`. `item` is text, token ids, a chat (a list of messages), or a map of arguments of `generate`."""

    __slots__ = ("_tries", "error", "inbox", "index", "item")

    def __init__(self, index: int, item: Any) -> None:
        self.index, self.item = index, item
        self.inbox: Inbox | None = None
        self.error: PenstockError | None = None
        self._tries = 0

    def order(self, common: Mapping[str, Any]) -> Generate:
        """Raises `InvalidRequest`."""
        item = self.item
        if isinstance(item, Mapping):
            return build(**{**common, **item})
        if isinstance(item, list | tuple) and item and isinstance(item[0], Mapping):
            return build(messages=item, **common)
        return build(item, **common)

    def wait(self, retries: int) -> float | None:
        """Seconds to wait before asking again, or none if the job has ended. Only what the engine was too busy for is asked again: an
        engine that is gone has been waited for already."""
        error = self.error if self.inbox is None else self.inbox.error
        if self._tries >= retries or not isinstance(error, Overloaded | Unavailable | LeaseExpired):
            return None
        self._tries += 1
        return error.retry_after or min(_LONGEST_WAIT, 0.1 * 2.0**self._tries)

    def outcome(self) -> Outcome:
        try:
            if self.error is not None or self.inbox is None:
                return Outcome(self.index, self.item, error=self.error)
            return Outcome(self.index, self.item, completion=self.inbox.completion())
        except PenstockError as error:
            return Outcome(self.index, self.item, error=error)
