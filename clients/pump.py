"""Moves frames between a link and a `Connection`, inside an asyncio event loop. No task of its own: two descriptors and one timer."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque

import zmq

from penstock.clients.connection import Connection
from penstock.clients.errors import ClientClosed, ConnectionLost, PenstockError, Unavailable
from penstock.clients.inbox import Inbox
from penstock.clients.link import Keys, Links

_ENOUGH = 64  # frames taken and readers woken by them, before the readers have their turn: else their chunks would only merge
_RETRY = 1.0  # seconds until a socket is tried again that could not be made


class Pump:
    """Belongs to the running event loop and to this process. Raises `InvalidRequest` for an address that cannot be."""

    def __init__(self, address: str, keys: Keys | None, connection: Connection) -> None:
        self.connection, self.address = connection, address
        self.loop, self.pid = asyncio.get_running_loop(), os.getpid()
        self._links = Links(address, keys)
        # A client that nobody closed must not hang where its sockets happen to be collected after their context.
        self._finalizer = weakref.finalize(self, self._links.close)
        self._timer: asyncio.TimerHandle | None = None
        self._kicked = self._reading = False
        self._ready: list[asyncio.Future[None]] = []
        self._dropped: deque[str] = deque()
        self._watch()

    async def wait_ready(self, seconds: float | None) -> None:
        """Wait for the engine. Raises `ConnectionLost` if nobody listens, `Unavailable` if it does not get ready in time."""
        if self.connection.error is not None:
            raise self.connection.error.again()
        if self.connection.ready:
            return
        future: asyncio.Future[None] = self.loop.create_future()
        self._ready.append(future)
        timer = None if seconds is None else self.loop.call_later(seconds, self._late, future, seconds)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()

    def check_process(self) -> None:
        """Raises `ClientClosed` in a forked child: the streams of the parent are the parent's."""
        if self.pid != os.getpid():
            raise ClientClosed("this stream belongs to the process that began it")

    def start(self, inbox: Inbox) -> None:
        self.connection.start(inbox, self.loop.time())
        self.kick()

    def cancel(self, *requests: str) -> None:
        for one in self.connection.cancel(requests, self.loop.time()):
            one.wake()
        self.kick()

    def drop(self, request: str) -> None:
        """Cancel from a finalizer, which may run in any thread, after the loop has ended, or in a forked process."""
        if self.pid == os.getpid() and not self.loop.is_closed():
            self._dropped.append(request)
            try:
                self.loop.call_soon_threadsafe(self._cancel_dropped)
            except RuntimeError:
                self._dropped.clear()  # the loop closed meanwhile; the lease ends the request

    def kick(self) -> None:
        """Send soon what there is to send: once for all that the tasks of this turn of the loop asked for."""
        if not self._kicked:
            self._kicked = True
            self.loop.call_soon(self._flush)

    def close(self) -> None:
        if self._links.closed:
            return
        for one in self.connection.close(self.loop.time()):
            one.wake()
        self._settle()
        if self._timer is not None:
            self._timer.cancel()
        self._unwatch()
        self._links.close(self.connection.outbox)
        self._finalizer.detach()

    def _watch(self) -> None:
        """Use a new link."""
        if self._links.link is not None:
            for file in self._links.link.files:
                self.loop.add_reader(file, self._readable)
        self.connection.opened(self.loop.time())
        self.kick()

    def _unwatch(self) -> None:
        if self._links.link is not None and not self.loop.is_closed():
            for file in self._links.link.files:
                self.loop.remove_reader(file)

    def _readable(self) -> None:
        self._reading = False
        connection, link = self.connection, self._links.link
        if link is None:
            return
        now, woken = self.loop.time(), 0
        while woken < _ENOUGH and not connection.reopen and (frame := link.receive()) is not None:
            news = connection.receive(frame, now)
            woken += 1 + len(news)
            for one in news:
                one.wake()
        if link.broken():
            if link.refused:
                for one in connection.refuse(now):
                    one.wake()
            else:
                connection.lost(now)
        self._flush()

    def _flush(self) -> None:
        self._kicked = False
        connection = self.connection
        if self._links.closed:
            return
        now = self.loop.time()
        if connection.reopen:
            self._unwatch()
            self._links.drop()
            if now >= connection.reopen_at:
                try:
                    self._links.open()
                    self._watch()
                except zmq.ZMQError:  # out of files, for one: that may pass
                    connection.reopen_at = now + _RETRY
        link = self._links.link
        if link is not None:
            if connection.outbox:
                link.send(connection.outbox)
                connection.outbox.clear()
            if link.pending and not self._reading:
                self._reading = True
                self.loop.call_soon(self._readable)
        if self._ready and (connection.ready or connection.error is not None):
            self._settle()
        due = min(connection.due, connection.reopen_at if connection.reopen else float("inf"))
        if self._timer is None or due < self._timer.when():
            self._arm(due)

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due == float("inf") else self.loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        for one in self.connection.tick(self.loop.time()):
            one.wake()
        self._flush()

    def _late(self, future: asyncio.Future[None], seconds: float) -> None:
        if not future.done():
            error: PenstockError = ConnectionLost(f"no engine answers at {self.address} within {seconds:g} s")
            if self._links.link is not None and self._links.link.connected:
                error = Unavailable(f"the engine at {self.address} was not ready within {seconds:g} s")
            future.set_exception(error)

    def _settle(self) -> None:
        waiting, self._ready = self._ready, []
        for future in waiting:
            if future.done():
                continue
            if self.connection.error is not None:
                future.set_exception(self.connection.error.again())
            else:
                future.set_result(None)

    def _cancel_dropped(self) -> None:
        if self._dropped and not self._links.closed:
            requests = tuple(self._dropped)
            self._dropped.clear()
            self.cancel(*requests)


def running_here(pump: Pump) -> bool:
    """Whether the pump belongs to the running loop of this process. Raises `ClientClosed` if it belongs to another loop of it."""
    if pump.pid != os.getpid():
        return False
    if asyncio.get_running_loop() is not pump.loop:
        raise ClientClosed("a client belongs to the event loop in which it was opened: open one in this loop")
    return True
