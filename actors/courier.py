"""Sends from a thread that is not an actor's own: a socket belongs to one thread."""

from __future__ import annotations

from typing import Any

import zmq

from penstock.actors.mailbox import open_outbox
from penstock.actors.messages import INSIDE


class Courier:
    """Of one thread. It keeps one connection, to the address that it sent to last: who gets the news is mostly the same."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._address = ""
        self._outbox: zmq.Socket[bytes] | None = None

    def send(self, address: str, message: Any) -> None:
        if address != self._address or self._outbox is None:
            self.close()
            self._address, self._outbox = address, open_outbox(self._context, address)
        self._outbox.send(INSIDE.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.close(linger=0)
            self._outbox = None
