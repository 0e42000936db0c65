"""One link to an engine: a DEALER socket and the monitor that tells when it breaks.

Plain sockets, not `zmq.asyncio`: the descriptors go into the caller's own event loop or poller, and after one wake-up everything that has
arrived is taken without waiting, which is several times cheaper than a future for each message.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import zmq

from penstock.actors.errors import Refusal
from penstock.actors.keys import is_key, read_pair, read_public
from penstock.clients.errors import InvalidRequest, from_wire

_FAREWELL = 0.1  # seconds that closing waits for the last frames to leave
_ROUTING_ID = 16  # bytes
_MONITORED = zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys (Z85 text) for an engine that asks for them: the server's public one, and this client's pair. `Keys.load` reads them
    from files. Raises `InvalidRequest` for text that is no key."""

    server: str
    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        for spec in fields(self):
            if not is_key(getattr(self, spec.name)):
                raise InvalidRequest(f"{spec.name}: must be a key, 40 characters of Z85", field=spec.name, limit="40 characters of Z85")

    @classmethod
    def load(cls, key: str | Path, server_key: str | Path) -> Self:
        """From the file of this client's secret key (`penstock keys new client`), and the server's public key: its file, or the key
        itself. Raises `InvalidRequest` for a file that cannot be read, or that others can."""
        try:
            pair = read_pair(Path(key))
            return cls(str(server_key) if is_key(str(server_key)) else read_public(Path(server_key)), pair.public, pair.secret)
        except Refusal as refusal:
            raise from_wire(refusal.fault.to_wire()) from None


class Link:
    """Opens at once and connects in the background, again and again until somebody listens. Its peer sees a new client each time that
    a link is made. Raises `zmq.ZMQError` for an address that cannot be."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: Keys | None = None) -> None:
        self.connected = self.refused = self._failed = False
        self._socket = context.socket(zmq.DEALER)
        # Credits bound what comes in, the caller what goes out: a high-water mark would block or drop instead.
        options = {
            zmq.SNDHWM: 0, zmq.RCVHWM: 0, zmq.LINGER: 0, zmq.RECONNECT_IVL: 20, zmq.RECONNECT_IVL_MAX: 1000,
            zmq.HEARTBEAT_IVL: 2000, zmq.HEARTBEAT_TIMEOUT: 10_000, zmq.IPV6: 1,
        }  # fmt: skip
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        # One that cannot be guessed: under the id of a broken connection, somebody else could be sent what was meant for it.
        self._socket.setsockopt(zmq.ROUTING_ID, secrets.token_bytes(_ROUTING_ID))
        if keys is not None:
            self._socket.curve_serverkey, self._socket.curve_publickey = keys.server.encode(), keys.public.encode()
            self._socket.curve_secretkey = keys.secret.encode()
        self._monitor = self._socket.get_monitor_socket(_MONITORED)
        try:
            self._socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise
        self.files = (int(self._socket.getsockopt(zmq.FD)), int(self._monitor.getsockopt(zmq.FD)))
        self.sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]] = (self._socket, self._monitor)

    def send(self, frames: Iterable[bytes]) -> None:
        """Never blocks: what cannot leave yet waits in memory. After a failed handshake nothing can: then the link is broken."""
        try:
            for frame in frames:
                self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self._failed = True

    def receive(self) -> bytes | None:
        """The next frame that has arrived, if any. A multi-part message is not of this protocol, and gives an empty frame."""
        try:
            frame = self._socket.recv(zmq.NOBLOCK)
            while self._socket.getsockopt(zmq.RCVMORE):
                frame = self._socket.recv(zmq.NOBLOCK)[:0]
        except zmq.Again:
            return None
        return frame

    @property
    def pending(self) -> bool:
        """Whether more has arrived. The descriptors signal only changes, so this must be asked after every use of the socket."""
        return any(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN for socket in self.sockets)

    def broken(self) -> bool:
        """Whether the peer went away since this was last asked. Also notes that it came, or refused this client's key."""
        broken, self._failed = self._failed, False
        try:
            while True:
                event = struct.unpack("=hi", self._monitor.recv_multipart(zmq.NOBLOCK)[0])[0]
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    self.connected = True
                else:
                    broken = True
                    self.refused = self.refused or event == zmq.Event.HANDSHAKE_FAILED_AUTH
        except zmq.Again:
            return broken

    def close(self, linger: float = 0.0) -> None:
        """Harmless twice. What was not sent within `linger` seconds is dropped."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=int(linger * 1000))


class Links:
    """The one link that a client has at a time, and what links are made of. Raises `InvalidRequest` for an address that cannot be."""

    def __init__(self, address: str, keys: Keys | None) -> None:
        self.link: Link | None = None
        self._address, self._keys = address, keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self.open()
        except zmq.ZMQError as error:
            self._context.term()
            limit = "ipc://PATH or tcp://HOST:PORT"
            raise InvalidRequest(f"address={address!r}: must be {limit}: {error}", field="address", value=address, limit=limit) from None

    def open(self) -> Link:
        """Raises `zmq.ZMQError` if there are no files left for sockets."""
        self.link = Link(self._context, self._address, self._keys)
        return self.link

    def drop(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None

    @property
    def closed(self) -> bool:
        return self._context.closed

    def close(self, last: Iterable[bytes] = ()) -> None:
        """Send the last frames if somebody is there to take them, and free everything. Harmless twice."""
        if self.link is not None:
            if self.link.connected:
                self.link.send(last)
            self.link.close(_FAREWELL if self.link.connected else 0.0)
            self.link = None
        self._context.term()
