"""A running request, for programs that block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from penstock.clients.inbox import Inbox
from penstock.clients.thread import Pump
from penstock.clients.values import Chunk, Completion


class Stream:
    """One request. `for chunk in stream` gives its chunks as they come, of all its samples in turn; leaving the loop early, by `break` or
    by an exception, cancels the request, and so does leaving `with stream`. `stream.completion()` waits for the whole of it. A stream
    that is read late loses nothing: what has come is merged into fewer, larger chunks. One thread reads a stream; any may cancel it.

    Both raise what the request failed with: see `penstock.clients.errors`.
    """

    def __init__(self, pump: Pump, inbox: Inbox, bell: threading.Event) -> None:
        self._pump, self._inbox, self._bell = pump, inbox, bell

    @property
    def request(self) -> str:
        """Its id, unique among the client's open requests."""
        return self._inbox.request

    @property
    def over(self) -> bool:
        """Whether the engine has ended it. Chunks may still be waiting here to be read."""
        return self._inbox.over

    def __iter__(self) -> Iterator[Chunk]:
        self._pump.check_process()
        return _Reading(self)

    def completion(self) -> Completion:
        """The whole request, also what was read as chunks before. An exception while waiting, such as Ctrl-C, cancels the request."""
        self._pump.check_process()
        try:
            while not self._inbox.over:
                self._bell.wait()
                self._bell.clear()
        except BaseException:
            self.cancel()
            raise
        return self._inbox.completion()

    def cancel(self) -> None:
        """End it now: the stream ends soon, with "cancelled" as its reason. Harmless twice, and after its end."""
        if not self._inbox.over:
            self._pump.cancel(self.request)

    def save(self) -> dict[str, Any]:
        """All that is needed to carry on after this program has ended, as a plain map for msgpack or JSON: see `Client.resume`."""
        with self._pump.lock:
            return self._inbox.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not self._inbox.over:
            self._pump.drop(self._inbox.request)

    def _next(self) -> Chunk:
        inbox = self._inbox
        while True:
            with self._pump.lock:
                self._bell.clear()
                inbox.waiting = False
                chunk = inbox.take()
                if chunk is not None:
                    return chunk
                if inbox.over:
                    break
                inbox.waiting = True
            self._bell.wait()
        if inbox.error is not None:
            raise inbox.error.again()
        raise StopIteration


class _Reading:
    """One `for`. When the loop is left its iterator is dropped, and with it the request."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return self._stream._next()

    def __del__(self) -> None:
        if not self._stream.over:
            self._stream._pump.drop(self._stream.request)
