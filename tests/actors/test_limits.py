"""What one client may do to the engine's memory and to the others: little, and it is told."""

import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from penstock.actors.protocol import TO_CLIENT, Accepted, Chunks, Failed, Goodbye, Hello, List, Listing, Renew, Status, Welcome
from penstock.clients.launcher import Engine


def ids(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


@pytest.fixture(scope="module")
def strict() -> Iterator[Engine]:
    limits = {"max_open_per_client": 8, "message_rate": 50.0, "byte_rate": 100_000.0, "max_message": 20_000, "lease": 30.0}
    with Engine("tiny", executor="mock", isolate_prefixes=True, **limits) as running:
        running.wait(60)
        yield running


@pytest.fixture
def enter(strict: Engine, connect: Callable[..., Any]) -> Callable[[], Any]:
    def make() -> Any:
        raw = connect(strict.address)
        raw.hello()
        return raw

    return make


def test_the_streams_of_a_client_are_limited_those_that_wait_for_a_tokenizer_included(enter: Callable[[], Any]) -> None:
    raw, other = enter(), enter()
    for number in range(9):
        raw.generate(f"r{number}", prompt="hello", params={"max_tokens": 30_000})
    error = raw.failure("r8")
    assert (error["code"], error["limit"], error["retryable"]) == ("overloaded", "8 streams", True)
    other.generate("r", ids=ids(1), params={"n": 8, "max_tokens": 1})
    assert other.done("r")["generated_tokens"] == 8


def test_a_flood_is_refused_then_not_read_and_disturbs_nobody(enter: Callable[[], Any]) -> None:
    raw, other = enter(), enter()
    for number in range(1500):
        raw.generate(f"r{number}", ids=b"", params={})
    codes: dict[str, int] = {}
    end = time.monotonic() + 10
    while not codes.get("unread") and time.monotonic() < end:
        error = raw.failure_of_any()
        codes["unread" if error[0] is None else error[1]["code"]] = codes.get(error[1]["code"], 0) + 1
    assert codes["invalid_request"] >= 200  # 4 seconds' worth
    assert codes["overloaded"] > codes["invalid_request"]
    begun = time.monotonic()
    other.generate("r", ids=ids(1), params={"max_tokens": 1})
    other.done("r")
    assert time.monotonic() - begun < 5
    accepted = False
    for late in range(20):  # it reads what was on its way, acknowledges it as clients do now and then, and is served again
        with suppress(TimeoutError):
            raw.wait(Welcome, seconds=0.5)
        raw.send(Renew(max((message.number for message in raw.got if isinstance(message, Chunks)), default=0)))
        raw.generate(f"late{late}", ids=ids(1), params={"max_tokens": 1})
        accepted = accepted or any(isinstance(message, Accepted) for message in raw.got)
        if accepted:
            break
    assert accepted


def test_answers_that_are_not_read_are_bounded(enter: Callable[[], Any]) -> None:
    raw = enter()
    raw.credit = False
    for number in range(150):
        raw.send(Status(number))
    answers = []
    while raw.socket.poll(1500):
        answers.append(raw.socket.recv())
    assert sum(map(len, answers)) < 6 * 20_000
    assert len(answers) < 150
    numbers = [message.number for message in map(TO_CLIENT.decode, answers) if isinstance(message, Chunks)]
    raw.send(Hello(raw.name, "again"))  # would forget what was not read
    assert raw.failure(None)["code"] == "malformed"
    raw.send(Renew(numbers[-1] + 1))  # so would this
    assert "were sent" in raw.failure(None)["message"]
    raw.send(Renew(numbers[-1]))
    raw.send(List(7))
    assert raw.wait(Listing).query == 7


def test_a_connection_says_hello_once_also_if_it_has_left(enter: Callable[[], Any]) -> None:
    raw = enter()
    raw.send(Goodbye())
    raw.send(Hello(raw.name, "again"))
    assert raw.failure(None)["code"] == "malformed"


def test_messages_that_are_hard_to_read_cost_no_actor_its_life(connect: Callable[..., Any]) -> None:
    with Engine("tiny", executor="mock", stall_timeout=3.0) as strict:
        strict.wait(60)
        other = connect(strict.address)
        other.hello()
        before = {row["kind"]: row["incarnation"] for row in other.until(lambda report: report["actors"])["actors"]}
        other.generate("x", ids=ids(1), params={"max_tokens": 1})
        resolved = other.wait(Accepted).resolved
        hard = {**resolved, "words": ((1,) * 1000,) * 63, "received": (b"\xff\xff\xff\x7f",)}  # judged id by id, and refused for the last
        crowd = [connect(strict.address) for _ in range(16)]
        for raw in crowd:
            raw.hello()
            for number in range(30):
                raw.generate(f"{number}", resume=hard)
        other.generate("r", prompt="hello", params={"max_tokens": 5})
        assert other.done("r")["generated_tokens"] == 5
        assert {crowd[0].wait(Failed).error["code"] for _ in range(30)} <= {"invalid_request", "overloaded"}
        assert {row["kind"]: row["incarnation"] for row in other.status()["actors"]} == before


def test_who_never_says_hello_is_answered_little(strict: Engine, connect: Callable[..., Any]) -> None:
    stranger = connect(strict.address)
    for number in range(1000):
        stranger.send(Status(number))
    answers = 0
    while stranger.socket.poll(1000):
        stranger.socket.recv()
        answers += 1
    assert 10 < answers < 200


def test_tenants_share_cached_prefixes_only_with_themselves_if_the_engine_isolates_them(enter: Callable[[], Any]) -> None:
    raw = enter()
    cached = []
    for number, tenant in enumerate(("a", "a", "b", "", "b")):
        raw.generate(f"r{number}", ids=ids(*range(2, 82)), params={"max_tokens": 1}, tenant=tenant)
        cached.append(raw.done(f"r{number}")["cached_tokens"])
    assert cached == [0, 64, 0, 0, 64]


def test_clients_that_come_before_the_engine_is_ready_are_welcomed_once_and_only_where_they_came_last(
    connect: Callable[..., Any], tmp_path: Any
) -> None:
    address = f"ipc://{tmp_path}/door"
    with Engine("tiny", executor="mock", address=address) as engine:
        early, again = connect(address), connect(address)
        again.name = early.name
        for raw in (early, again):
            while not os.path.exists(tmp_path / "door"):
                time.sleep(0.01)
            raw.send(Hello(raw.name, "early"))
            raw.status()
        engine.wait(60)
        again.wait(Welcome)
        assert not [message for message in early.got if isinstance(message, Welcome)] or not early.socket.poll(100)
        again.generate("r", ids=ids(1), params={"max_tokens": 1})
        assert isinstance(again.wait(Chunks), Chunks)
