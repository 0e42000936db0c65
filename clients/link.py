"""One link to an engine: a DEALER socket and the monitor that tells when it breaks.

Plain sockets, not `zmq.asyncio`: the descriptors go into the caller's own event loop or poller, and after one wake-up everything that has
arrived is taken without waiting, which is several times cheaper than a future for each message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import zmq

from penstock.clients.errors import InvalidRequest

_FAREWELL = 0.1  # seconds that closing waits for the last frames to leave
_MONITORED = zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys (Z85 text) for an engine that is not on this machine: the server's public one, and this client's pair."""

    server: str
    public: str
    secret: str


class Link:
    """Opens at once and connects in the background, again and again until somebody listens. Its peer sees a new client each time that
    a link is made. Raises `zmq.ZMQError` for an address that cannot be."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: Keys | None = None) -> None:
        self.connected = False
        self._socket = context.socket(zmq.DEALER)
        # Credits bound what comes in, the caller what goes out: a high-water mark would block or drop instead.
        options = {
            zmq.SNDHWM: 0, zmq.RCVHWM: 0, zmq.LINGER: 0, zmq.RECONNECT_IVL: 20, zmq.RECONNECT_IVL_MAX: 1000,
            zmq.HEARTBEAT_IVL: 2000, zmq.HEARTBEAT_TIMEOUT: 10_000, zmq.IPV6: 1,
        }  # fmt: skip
        for option, value in options.items():
            self._socket.setsockopt(option, value)
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
        """Never blocks: what cannot leave yet waits in memory."""
        for frame in frames:
            self._socket.send(frame, zmq.NOBLOCK)

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
        """Whether the peer went away since this was last asked. Also notes that it came."""
        broken = False
        try:
            while True:
                event = struct.unpack("=hi", self._monitor.recv_multipart(zmq.NOBLOCK)[0])[0]
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    self.connected = True
                else:
                    broken = True
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
