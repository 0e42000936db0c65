"""Moves frames between a link and a `Connection` in a thread of its own, so that a blocking program's lease is renewed while it works."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import zmq

from penstock.clients.connection import Connection, News
from penstock.clients.errors import ClientClosed, ConnectionLost, Unavailable
from penstock.clients.inbox import Inbox
from penstock.clients.link import Keys, Links

_BURST = 32  # frames taken under one lock
_LONGEST_POLL = 60.0  # seconds
_RETRY = 1.0  # seconds until a socket is tried again that could not be made

T = TypeVar("T")


class Pump:
    """Sockets are touched only by the thread, the connection only under `lock`. Raises `InvalidRequest` for an address that cannot be."""

    def __init__(self, address: str, keys: Keys | None, connection: Connection) -> None:
        self.connection, self.address, self.pid = connection, address, os.getpid()
        self.lock = threading.Lock()
        self._links = Links(address, keys)
        self._settled = threading.Condition(self.lock)
        self._nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._dropped: deque[str] = deque()
        self._poller = zmq.Poller()
        self._poller.register(self._nudge, zmq.POLLIN)
        self._watch()
        self._thread = threading.Thread(target=self._run, name="penstock-client", daemon=True)
        self._thread.start()

    def wait_ready(self, seconds: float | None) -> None:
        """Wait for the engine. Raises `ConnectionLost` if nobody listens, `Unavailable` if it does not get ready in time."""
        with self._settled:
            self._settled.wait_for(lambda: self.connection.ready or self.connection.error is not None, seconds)
            if self.connection.error is not None:
                raise self.connection.error.again()
            if self.connection.ready:
                return
            if self._links.link is not None and self._links.link.connected:
                raise Unavailable(f"the engine at {self.address} was not ready within {seconds:g} s")
            raise ConnectionLost(f"no engine answers at {self.address} within {seconds:g} s")

    def check_process(self) -> None:
        """Raises `ClientClosed` in a forked child: the streams of the parent are the parent's."""
        if self.pid != os.getpid():
            raise ClientClosed("this stream belongs to the process that began it")

    def start(self, inbox: Inbox) -> None:
        self.call(lambda connection, now: connection.start(inbox, now))

    def cancel(self, *requests: str) -> None:
        _wake(self.call(lambda connection, now: connection.cancel(requests, now)))

    def call(self, use: Callable[[Connection, float], T]) -> T:
        """Use the connection from any thread."""
        with self.lock:
            if self._closing:
                raise ClientClosed("the client is closed")
            result = use(self.connection, time.monotonic())
        os.eventfd_write(self._nudge, 1)
        return result

    def close(self) -> None:
        with self.lock:
            if self._closing:
                return
            self._closing = True
            news = self.connection.close(time.monotonic())
            self._settled.notify_all()
        _wake(news)
        os.eventfd_write(self._nudge, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            os.close(self._nudge)

    def drop(self, request: str) -> None:
        """Cancel from a finalizer, which may run in any thread, whatever locks that holds, or in a forked process."""
        if self.pid == os.getpid() and not self._closing:
            self._dropped.append(request)
            os.eventfd_write(self._nudge, 1)

    def _run(self) -> None:
        while not self._closing:
            self._turn()
        self._links.close(self.connection.outbox)

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        with self.lock:
            now = time.monotonic()
            self._refresh(now)
            due = min(self.connection.due, self.connection.reopen_at if self.connection.reopen else float("inf"))
        self._poller.poll(1 + int(1000 * min(_LONGEST_POLL, max(0.0, due - now))))
        with suppress(BlockingIOError):  # woken by the link or the clock
            os.eventfd_read(self._nudge)
        link = self._links.link
        frames: list[bytes] = []
        while link is not None and len(frames) < _BURST and (frame := link.receive()) is not None:
            frames.append(frame)
        broken = link is not None and link.broken()
        news: News = []
        with self.lock:
            now = time.monotonic()
            for frame in frames:
                news += self.connection.receive(frame, now)
                if self.connection.reopen:
                    break
            if broken and link is not None and link.refused:
                news += self.connection.refuse(now)
            elif broken:
                self.connection.lost(now)
            if now >= self.connection.due:
                news += self.connection.tick(now)
            if self._dropped:
                dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
                news += self.connection.cancel(dropped, now)
            if self.connection.ready or self.connection.error is not None:
                self._settled.notify_all()
        _wake(news)

    def _refresh(self, now: float) -> None:
        """Replace the link if it must be, and send what there is to send."""
        connection = self.connection
        if connection.reopen:
            self._unwatch()
            self._links.drop()
            if now >= connection.reopen_at:
                try:
                    self._links.open()
                    self._watch()
                except zmq.ZMQError:  # out of files, for one: that may pass
                    connection.reopen_at = now + _RETRY
        if self._links.link is not None and connection.outbox:
            self._links.link.send(connection.outbox)
            connection.outbox.clear()

    def _watch(self) -> None:
        """Use a new link."""
        for socket in self._links.link.sockets if self._links.link is not None else ():
            self._poller.register(socket, zmq.POLLIN)
        self.connection.opened(time.monotonic())

    def _unwatch(self) -> None:
        for socket in self._links.link.sockets if self._links.link is not None else ():
            self._poller.unregister(socket)


def _wake(news: News) -> None:
    for one in news:
        one.wake()
