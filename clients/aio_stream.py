"""A running request, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from types import TracebackType
from typing import Any, Self

from penstock.clients.inbox import Inbox
from penstock.clients.pump import Pump
from penstock.clients.values import Chunk, Completion

_ONE_READER = "another task is waiting for this stream: a stream has one reader"


class Bell:
    """Wakes the one task that waits for a request. Apart from the stream, so that a stream nobody holds any more is noticed."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


class AsyncStream:
    """One request. `async for chunk in stream` gives its chunks as they come, of all its samples in turn; leaving the loop early, by
    `break` or by an exception, cancels the request, and so does leaving `async with stream`. `await stream.completion()` waits for the
    whole of it. A stream that is read late loses nothing: what has come is merged into fewer, larger chunks.

    Both raise what the request failed with: see `penstock.clients.errors`.
    """

    def __init__(self, pump: Pump, inbox: Inbox, bell: Bell) -> None:
        self._pump, self._inbox, self._bell = pump, inbox, bell

    @property
    def request(self) -> str:
        """Its id, unique among the client's open requests."""
        return self._inbox.request

    @property
    def over(self) -> bool:
        """Whether the engine has ended it. Chunks may still be waiting here to be read."""
        return self._inbox.over

    def __aiter__(self) -> AsyncIterator[Chunk]:
        self._pump.check_process()
        return _Reading(self)

    async def completion(self) -> Completion:
        """The whole request, also what was read as chunks before. Cancelling the waiting task cancels the request."""
        self._pump.check_process()
        if self._bell.future is not None:
            raise RuntimeError(_ONE_READER)
        self._bell.future = self._pump.loop.create_future()
        try:
            if not self._inbox.over:
                await self._bell.future
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._bell.future = None
        return self._inbox.completion()

    def cancel(self) -> None:
        """End it now: the stream ends soon, with "cancelled" as its reason. Harmless twice, and after its end."""
        if not self._inbox.over:
            self._pump.cancel(self.request)

    def save(self) -> dict[str, Any]:
        """All that is needed to carry on after this program has ended, as a plain map for msgpack or JSON: see `AsyncClient.resume`."""
        return self._inbox.save()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not self._inbox.over:
            self._pump.drop(self._inbox.request)

    def _next(self) -> Generator[Any, None, Chunk]:
        """The next chunk, awaited: a plain generator, since this runs for each chunk and a nested coroutine costs as much as a future."""
        inbox, bell = self._inbox, self._bell
        while (chunk := inbox.take()) is None:
            if inbox.over:
                if inbox.error is not None:
                    raise inbox.error.again()
                raise StopAsyncIteration
            if bell.future is not None:
                raise RuntimeError(_ONE_READER)
            future = bell.future = self._pump.loop.create_future()
            inbox.waiting = True
            try:
                yield from future
            finally:
                bell.future, inbox.waiting = None, False
        return chunk


class _Reading:
    """One `async for`. When the loop is left its iterator is dropped, and with it the request."""

    __slots__ = ("_stream",)

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Chunk]:
        return self._stream._next()

    def __del__(self) -> None:
        if not self._stream.over:
            self._stream._pump.drop(self._stream.request)
