"""A real engine with a mock executor, shared by the tests of a module, and bare sockets to it."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pytest
import zmq

from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY, Chunks, Failed, Generate, Hello, Renew, Report, Status, Welcome
from penstock.clients.launcher import Engine

M = TypeVar("M")


class RawClient:
    """The protocol by hand: a DEALER that sends what it is told, rubbish included, and keeps every message that comes."""

    def __init__(self, address: str, prepare: Callable[[Any], None] = lambda _: None) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        prepare(self.socket)
        self.socket.connect(address)
        self.name = uuid.uuid4().hex
        self.got: list[Any] = []
        self.queries = 0
        self.credit = True  # acknowledge what comes

    def hello(self) -> Welcome:
        self.send(Hello(self.name, "test"))
        return self.wait(Welcome)

    def send(self, message: Any) -> None:
        with suppress(zmq.Again):  # a connection that was refused leads nowhere
            self.socket.send(message if isinstance(message, bytes) else TO_GATEWAY.encode(message), zmq.NOBLOCK)

    def generate(self, request: str, **values: Any) -> None:
        fields = {"prompt": None, "messages": None, "ids": None, "params": {}, "options": {}, "adapter": None, "adapter_token": None}
        fields |= {"priority": 0}
        fields |= {"tenant": "", "deadline": None, "queue_timeout": None, "resume": None}
        self.send(Generate(request, **(fields | values)))

    def wait(self, kind: type[M], match: Callable[[M], bool] = lambda _: True, seconds: float = 20.0) -> M:
        """The first message of this kind from now on that matches; everything that comes is kept in `got`."""
        end = time.monotonic() + seconds
        while self.socket.poll(max(0, int(1000 * (end - time.monotonic())))):
            message = TO_CLIENT.decode(self.socket.recv())
            self.got.append(message)
            if isinstance(message, Chunks) and self.credit:
                self.send(Renew(message.number))
            if isinstance(message, kind) and match(message):
                return message
        raise TimeoutError(f"no {kind.__name__} within {seconds} s; got {self.got[-5:]}")

    def failure(self, request: str | None) -> dict[str, Any]:
        return self.wait(Failed, lambda message: message.request == request).error

    def failure_of_any(self) -> tuple[str | None, dict[str, Any]]:
        message = self.wait(Failed)
        return message.request, message.error

    def done(self, request: str) -> dict[str, Any]:
        """The usage of a request, at its end."""
        chunks = self.wait(Chunks, lambda message: any(row[0] == request for row in message.done))
        return next(usage for name, usage in chunks.done if name == request)

    def status_sent(self) -> None:
        self.queries += 1
        self.send(Status(self.queries))

    def status(self) -> dict[str, Any]:
        self.status_sent()
        return self.wait(Report, lambda message: message.query == self.queries).report

    def until(self, holds: Callable[[dict[str, Any]], bool], seconds: float = 20.0) -> dict[str, Any]:
        """Ask for the status until something holds of it. What is not answered soon is asked again, as clients do: a gateway that ends
        takes questions along, and so does a socket that had just reached it."""
        end = time.monotonic() + seconds
        report: dict[str, Any] | None = None
        while report is None or not holds(report):
            if time.monotonic() > end:
                raise TimeoutError(f"it never came true of {report}")
            time.sleep(0.1)
            self.status_sent()
            with suppress(TimeoutError):
                report = self.wait(Report, lambda message: message.query == self.queries, seconds=1.0).report
        return report

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("tiny", executor="mock", max_open=256, lease=2.0, max_message=100_000) as running:
        running.wait(60)
        yield running


@pytest.fixture
def connect() -> Iterator[Callable[..., RawClient]]:
    """Makes bare clients, and closes them."""
    clients: list[RawClient] = []

    def make(address: str, **more: Any) -> RawClient:
        clients.append(RawClient(address, **more))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def raw(engine: Engine, connect: Callable[[str], RawClient]) -> RawClient:
    client = connect(engine.address)
    client.hello()
    return client
