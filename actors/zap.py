"""Who may connect: the handler that ZeroMQ asks during each handshake (ZAP, https://rfc.zeromq.org/spec/27).

A socket of the gateway's own loop, without a thread. Every frame of a connection then bears its key as the `User-Id`, put there by the
library and not by the peer; so whoever loses the key loses the connections that were made with it, too.
"""

from __future__ import annotations

import zmq
from zmq.utils import z85

from penstock.actors.keys import KeyFolder

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"penstock"
BATCH = 64


class Zap:
    """Answers for the sockets of `context`: one handler a context. It must be bound before the first connection comes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: KeyFolder) -> None:
        self.keys = keys
        self.refused = 0  # connections
        self.socket = context.socket(zmq.REP)
        self.socket.bind(ENDPOINT)

    def answer(self) -> None:
        """Answer who is waiting, and never wait."""
        for _ in range(BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            version, number = (*frames, b"", b"")[:2]
            key = self._key(frames)
            if key is None:
                self.refused += 1
            status = (b"400", b"not authorized", b"") if key is None else (b"200", b"OK", key.encode())
            self.socket.send_multipart((version, number, *status, b""), zmq.NOBLOCK)

    def _key(self, frames: list[bytes]) -> str | None:
        """The public key of a peer that may come in: it has proved that it holds the secret one."""
        if len(frames) != 7 or frames[0] != b"1.0" or frames[2] != DOMAIN or frames[5] != b"CURVE" or len(frames[6]) != 32:
            return None
        key = z85.encode(frames[6]).decode()
        self.keys.glance()
        return key if key in self.keys.users else None

    def close(self) -> None:
        self.socket.close(linger=0)
