"""A gateway that speaks PROTOCOL.md and serves made-up tokens: pure (frames in, frames out), and behind a socket in a thread."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import zmq

from penstock.actors import protocol as wire
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY


def token(prompt: str, sample: int, position: int) -> int:
    digest = hashlib.sha256(f"{prompt}/{sample}/{position}".encode()).digest()
    return int.from_bytes(digest[:3], "little")


def text_of(ids: list[int]) -> str:
    return "".join(f"<{id}>" for id in ids)


def expected(prompt: str, sample: int, count: int) -> list[int]:
    return [token(prompt, sample, position) for position in range(count)]


@dataclass
class Served:
    request: str
    client: str
    prompt: str
    counts: list[int]
    limit: int
    streams: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def generated(self) -> int:
        return sum(self.limit if count < 0 else count for count in self.counts)


class FakeGateway:
    """`deaf` swallows everything; `sends_away` answers `Goodbye`; `refuse` maps a prompt to the error map that it gets."""

    def __init__(
        self, engine: str = "e1", lease: float = 10.0, window: int = 8, limits: dict[str, Any] | None = None, ready: bool = True
    ) -> None:
        self.engine, self.lease, self.window, self.ready = engine, lease, window, ready
        self.limits = {"message": 100_000} if limits is None else limits
        self.connections: dict[Any, str] = {}
        self.numbers: dict[Any, int] = {}
        self.acknowledged: dict[Any, int] = {}
        self.served: dict[tuple[str, str], Served] = {}
        self.refuse: dict[str, list[dict[str, Any]]] = {}
        self.heard: list[Any] = []
        self.deaf = False
        self.hold = False
        self._next_stream = 0

    def receive(self, peer: Any, frame: bytes) -> list[tuple[Any, bytes]]:
        if self.deaf:
            return []
        message = TO_GATEWAY.decode(frame)
        self.heard.append(message)
        if isinstance(message, wire.Hello):
            if self.connections.get(peer) != message.client:
                # The newest connection of a client is the one: its requests wait to be resumed there.
                self.connections = {old: client for old, client in self.connections.items() if client != message.client}
                self.served = {key: one for key, one in self.served.items() if one.client != message.client}
                self.connections[peer], self.numbers[peer], self.acknowledged[peer] = message.client, 0, 0
            return self._welcome(peer) if self.ready else []
        if peer not in self.connections:
            return [(peer, TO_CLIENT.encode(wire.Goodbye()))]
        client = self.connections[peer]
        if isinstance(message, wire.Generate):
            return [(peer, self._generate(client, message))]
        if isinstance(message, wire.Cancel):
            for request in message.requests:
                if (client, request) in self.served:
                    self.served[client, request].cancelled = True
        if isinstance(message, wire.Renew):
            self.acknowledged[peer] = message.received
        if isinstance(message, wire.Status):
            return [(peer, TO_CLIENT.encode(wire.Report(message.query, {"state": "ready"})))]
        if isinstance(message, wire.Goodbye):
            self.served = {key: value for key, value in self.served.items() if key[0] != client}
            self.forget(peer)
        if isinstance(message, wire.List):
            rows = [
                {"request": one.request, "state": "running", "prompt_tokens": 1, "generated_tokens": one.generated, "age": 0.1}
                for one in self.served.values()
                if one.client == client
            ]
            return [(peer, TO_CLIENT.encode(wire.Listing(message.query, tuple(rows))))]
        return []

    def get_ready(self) -> list[tuple[Any, bytes]]:
        self.ready = True
        return [frame for peer in self.connections for frame in self._welcome(peer)]

    def forget(self, peer: Any) -> None:
        del self.connections[peer]

    def step(self, rng: random.Random, most: int = 3) -> list[tuple[Any, bytes]]:
        """One message for each connection with something to say, of random rows of its streams."""
        out = []
        for peer, client in self.connections.items():
            if self.hold or self.numbers[peer] - self.acknowledged[peer] >= self.window:
                continue
            streams, counts, ids, texts, details, ends, done = array("i"), array("i"), array("i"), [], [], [], []
            for one in [one for one in self.served.values() if one.client == client]:
                for sample in range(len(one.counts)):
                    start = one.counts[sample]
                    if start < 0 or (rng.random() < 0.3 and not one.cancelled):
                        continue
                    stop = start if one.cancelled else min(one.limit, start + rng.randint(0, most))
                    fresh = [token(one.prompt, sample, position) for position in range(start, stop)]
                    if fresh or rng.random() < 0.1:
                        streams.append(one.streams[sample])
                        counts.append(len(fresh))
                        ids.extend(fresh)
                        texts.append(text_of(fresh))
                    one.counts[sample] = stop
                    if one.cancelled or stop == one.limit:
                        ends.append((one.streams[sample], "cancelled" if one.cancelled else "length", {}))
                        one.counts[sample] = -1
                if all(count < 0 for count in one.counts):
                    done.append((one.request, {"prompt_tokens": 1, "generated_tokens": one.limit * len(one.counts), "from_the_future": 1}))
                    del self.served[client, one.request]
            if streams or ends or done:
                self.numbers[peer] += 1
                columns = (streams.tobytes(), counts.tobytes(), ids.tobytes())
                news = wire.Chunks(self.numbers[peer], *columns, tuple(texts), tuple(details), tuple(ends), tuple(done))
                out.append((peer, TO_CLIENT.encode(news)))
        return out

    def _welcome(self, peer: Any) -> list[tuple[Any, bytes]]:
        return [(peer, TO_CLIENT.encode(wire.Welcome(self.engine, {"name": "fake"}, self.limits, self.lease, self.window)))]

    def _generate(self, client: str, message: wire.Generate) -> bytes:
        begun = message.resume
        prompt = begun["prompt_text"] if begun else message.prompt or text_of(array("i", message.ids or b"").tolist())
        if self.refuse.get(prompt):
            return TO_CLIENT.encode(wire.Failed(message.request, self.refuse[prompt].pop(0)))
        params = begun["params"] if begun else message.params
        n, limit = params.get("n", 1), params.get("max_tokens", 16)
        received = [len(one) // 4 for one in (begun["received"] if begun else ())] or [0] * n
        streams = list(range(self._next_stream, self._next_stream + n))
        self._next_stream += n
        self.served[client, message.request] = Served(message.request, client, prompt, received, limit, streams)
        resolved = {"prompt_text": prompt, "params": {"seed": 7, **params}, "prompt": array("i", [1, 2]).tobytes()}
        return TO_CLIENT.encode(wire.Accepted(message.request, tuple(streams), resolved))


class FakeServer:
    """The fake behind a ROUTER, in a thread. `pause` seconds lie between its steps; `restart` puts another engine behind the address."""

    def __init__(self, address: str, pause: float = 0.001, secret: bytes | None = None, **options: Any) -> None:
        self._secret = secret
        self.address, self.pause, self.options = address, pause, options
        self.gateway = FakeGateway(**options)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._sudden = False
        self.start()

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def restart(self, engine: str) -> None:
        self.stop()
        self.gateway = FakeGateway(**{**self.options, "engine": engine})
        self.start()

    def _run(self) -> None:
        context = zmq.Context()
        router = context.socket(zmq.ROUTER)
        if self._secret is not None:
            router.curve_server, router.curve_secretkey = True, self._secret
        router.bind(self.address)
        rng = random.Random(0)
        try:
            while not self._stop.is_set():
                out = []
                while router.poll(0):
                    peer, frame = router.recv_multipart()
                    out += self.gateway.receive(peer, frame)
                for peer, frame in out + self.gateway.step(rng):
                    router.send_multipart([peer, frame])
                time.sleep(self.pause)
        finally:
            router.close(linger=0)
            context.term()
