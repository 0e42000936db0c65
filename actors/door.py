"""The socket that clients connect to, and the first look at whatever comes through it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from penstock.actors.errors import Refusal
from penstock.actors.messages import TO_CLIENT, TO_GATEWAY
from penstock.actors.wire import Limits, WireError

BATCH = 256  # messages taken before others have their turn


class Door:
    """A ROUTER. `address` is where it is bound; frames up to twice `max_message` bytes arrive, so that their sender gets an answer,
    and longer ones end the connection. Raises `Refusal` if the address is taken."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, max_message: int) -> None:
        self.limits = Limits(bytes=max_message)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_message)
        self.socket.setsockopt(zmq.LINGER, 500)
        # Beyond this a ROUTER silently drops: chunks are bounded by credits, answers only by what a client asks without reading.
        self.socket.setsockopt(zmq.SNDHWM, 20_000)
        if address.startswith("ipc://"):
            _refuse_if_taken(Path(address.removeprefix("ipc://")))
        try:
            self.socket.bind(address.replace("//localhost:", "//127.0.0.1:"))
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            raise Refusal("start_error", f"cannot listen at {address}: {error}", field="address", value=address) from error

    def receive(self) -> Iterator[tuple[bytes, bytes | WireError]]:
        """Identity and frame of what has arrived, at most `BATCH`."""
        for _ in range(BATCH):
            try:
                identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield identity, frames[0] if len(frames) == 1 else WireError("malformed", f"a message is one frame, not {len(frames)}")

    def decode(self, frame: bytes | WireError) -> Any:
        """Raises `WireError` for anything but a message of the protocol."""
        if isinstance(frame, WireError):
            raise frame
        return TO_GATEWAY.decode_untrusted(frame, self.limits)

    def send(self, identity: bytes, message: Any) -> None:
        """Never blocks: what a vanished client does not take is dropped."""
        self.socket.send_multipart((identity, TO_CLIENT.encode(message)), zmq.NOBLOCK)

    def close(self) -> None:
        self.socket.close()


def _refuse_if_taken(path: Path) -> None:
    """ZeroMQ would silently take the path away from a living engine."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise Refusal("start_error", f"an engine listens at ipc://{path} already", field="address", value=f"ipc://{path}")
