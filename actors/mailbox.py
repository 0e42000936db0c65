"""The sockets of one actor: an inbox that it binds, and an outbox to each peer.

Sends never block: there are no high-water marks inside, because admission at the gateway bounds everything behind it. Each
incarnation of an actor binds a new address, since a PUSH to a dead ipc address would deliver its whole stale queue to the next
process bound there.
"""

from __future__ import annotations

from typing import Any

import zmq

from penstock.actors.messages import INSIDE

LINGER_MS = 500  # a last word to the supervisor may still be on its way when an actor closes


class Mailbox:
    """Owned by one thread, as ZeroMQ sockets must be. `K` names a peer: (kind, index)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._context = context
        self._inbox = context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._inbox.bind(address)
        self._outboxes: dict[tuple[str, int], tuple[str, zmq.Socket[bytes]]] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)

    def watch(self, source: zmq.Socket[bytes] | int) -> None:
        """Also wake up for another socket, or a file descriptor."""
        self._poller.register(source, zmq.POLLIN)

    def unwatch(self, source: zmq.Socket[bytes] | int) -> None:
        self._poller.unregister(source)

    def wait(self, seconds: float) -> list[Any]:
        """Sleep until something arrives, at most so long. Returns the watched sources that are ready, the inbox excepted."""
        ready = self._poller.poll(max(0, int(seconds * 1000 + 0.999)))
        return [source for source, _ in ready if source is not self._inbox]

    def receive(self) -> Any | None:
        """The next message, or None if there is none now."""
        try:
            frame = self._inbox.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return INSIDE.decode(frame)

    def connect(self, peer: tuple[str, int], address: str) -> None:
        """Send to `peer` at `address` from now on; what was not yet delivered to another address of it is dropped."""
        known = self._outboxes.get(peer)
        if known is not None:
            if known[0] == address:
                return
            known[1].close(linger=0)
        self._outboxes[peer] = address, open_outbox(self._context, address)

    def send(self, peer: tuple[str, int], message: Any) -> bool:
        """Queue a message. False, and nothing else happens, if the peer is not known, or (over inproc) has closed its inbox."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            return False
        try:
            outbox[1].send(INSIDE.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._inbox.close(linger=0)
        for _, outbox in self._outboxes.values():
            outbox.close(linger=LINGER_MS)


def open_outbox(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    outbox = context.socket(zmq.PUSH)
    outbox.setsockopt(zmq.SNDHWM, 0)
    outbox.connect(address)
    return outbox
