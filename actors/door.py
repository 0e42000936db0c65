"""The socket that clients connect to, and the first look at whatever comes through it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.actors.keys import KeyFolder, read_pair
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY
from penstock.actors.wire import Limits, WireError
from penstock.actors.zap import DOMAIN, Zap

BATCH = 256  # messages taken before others have their turn
LOOK_EVERY_S = 0.1  # at the folder of keys
MOST_ANSWERS = 1024  # that may wait for one connection, besides one for each of its requests
ROUTING_ID = 16  # bytes, at least, that a connection with a key must have chosen for itself


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message, from the connection `identity`, made with `key` (empty where none are demanded). `size` in bytes."""

    identity: bytes
    key: str
    frame: bytes | WireError
    size: int


class Door:
    """A ROUTER, bound at the configured address. Frames up to twice `max_message` bytes arrive, so that their sender gets an answer, and
    longer ones end the connection. Raises `Refusal` if the address is taken, or the keys cannot be read."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], config: EngineConfig) -> None:
        address = config.address or ""
        self.limits = Limits(bytes=config.max_message)
        self.zap: Zap | None = None
        self.users = {"": ""}  # who may come in, by key; without keys, anyone who can reach the address
        self._looked = 0.0
        pair = read_pair(Path(config.secret_key)) if config.secret_key is not None else None
        folder = KeyFolder(Path(config.client_keys)) if config.client_keys is not None else None
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * config.max_message)
        self.socket.setsockopt(zmq.IPV6, address.startswith("tcp://["))
        self.socket.setsockopt(zmq.LINGER, 500)
        # Beyond this a ROUTER silently drops. Chunks are bounded by credits, answers by what a client acknowledges; so it is for those who
        # acknowledge what they do not read.
        self.socket.setsockopt(zmq.SNDHWM, config.max_open_per_client + config.window + MOST_ANSWERS)
        if address.startswith("ipc://"):
            _refuse_if_taken(Path(address.removeprefix("ipc://")))
        try:
            if pair is not None and folder is not None:
                self.zap, self.users = Zap(context, folder), folder.users
                self.socket.curve_server, self.socket.curve_secretkey = True, pair.secret.encode()
                self.socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
                self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, True)  # nobody to ask means nobody comes in
            self.socket.bind(address.replace("//localhost:", "//127.0.0.1:"))
        except zmq.ZMQError as error:
            self.close(linger=0)
            raise Refusal("start_error", f"cannot listen at {address}: {error}", field="address", value=address) from error

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What to wake up for."""
        return [self.socket] if self.zap is None else [self.socket, self.zap.socket]

    @property
    def refused(self) -> int:
        """Connections that had no key, or none that is known."""
        return 0 if self.zap is None else self.zap.refused

    @property
    def unreadable(self) -> list[str]:
        """What is wrong with files in the folder of keys."""
        return [] if self.zap is None else self.zap.keys.unreadable

    @property
    def error(self) -> str | None:
        """Why the folder of keys cannot be read now."""
        return None if self.zap is None else self.zap.keys.error

    def look(self, now: float) -> bool:
        """Judge who is connecting, by the keys as they are now. Whether who may come in has changed: `users` says so from here on."""
        if self.zap is None:
            return False
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self.zap.keys.look()
        self.zap.answer()
        before, self.users = self.users, self.zap.keys.users
        return self.users is not before

    def fits(self, identity: bytes) -> bool:
        """Whether a connection may say Hello under this routing id. Those that the library gives out are counted up; when a connection
        breaks, another user could connect under the next one and be sent what was not meant for it. A random one cannot be guessed."""
        return self.zap is None or len(identity) >= ROUTING_ID

    def receive(self) -> Iterator[Arrival]:
        """What has arrived, at most `BATCH`."""
        for _ in range(BATCH):
            try:
                yield self._receive()
            except zmq.Again:
                return

    def _receive(self) -> Arrival:
        key = ""
        if self.zap is None:
            identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        else:
            parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            key = str(parts[-1].get("User-Id"))
            identity, *frames = (part.bytes for part in parts)
        size = sum(map(len, frames))
        if len(frames) != 1:
            return Arrival(identity, key, WireError("malformed", f"a message is one frame, not {len(frames)}"), size)
        return Arrival(identity, key, frames[0], size)

    def decode(self, frame: bytes | WireError) -> Any:
        """Raises `WireError` for anything but a message of the protocol."""
        if isinstance(frame, WireError):
            raise frame
        return TO_GATEWAY.decode_untrusted(frame, self.limits)

    def send(self, identity: bytes, message: Any) -> int:
        """Never blocks: what a vanished client does not take is dropped. Returns the bytes of the message."""
        frame = TO_CLIENT.encode(message)
        self.socket.send_multipart((identity, frame), zmq.NOBLOCK)
        return len(frame)

    def close(self, linger: int | None = None) -> None:
        self.socket.close(linger=linger)
        if self.zap is not None:
            self.zap.close()


def _refuse_if_taken(path: Path) -> None:
    """ZeroMQ would silently take the path away from a living engine."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise Refusal("start_error", f"an engine listens at ipc://{path} already", field="address", value=f"ipc://{path}")
