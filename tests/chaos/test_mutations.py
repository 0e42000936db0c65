"""Rubbish at the door: none of it ends an actor, leaves anything behind, or reaches the tokenizer unchecked."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.actors.errors import CODES
from penstock.actors.messages import Encode
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY, Accepted, Chunks, Failed, Generate, Goodbye, Hello, Renew, Report, Status
from penstock.clients.launcher import Engine
from penstock.engine.chat import check_messages
from penstock.engine.params import PromptOptions

from .mutator import Mutator
from .onethread import DOOR, OneThread

IN_PROCESS, OVER_SOCKETS = 100_000, 5_000
AT_ONCE = 16
IDS = array("i", range(2, 20)).tobytes()
PLAIN = Generate("first", None, None, IDS, {"max_tokens": 20, "seed": 1}, {}, None, 0, "", None, None, None, None)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[OneThread]:
    engine = OneThread(tmp_path, max_open=64, max_running=8, max_message=20_000)
    yield engine
    engine.close()


def connect(context: zmq.Context[Any], address: str) -> zmq.Socket[Any]:
    client = context.socket(zmq.DEALER)
    client.setsockopt(zmq.SNDHWM, 0)
    client.setsockopt(zmq.RCVHWM, 0)
    client.connect(address)
    return client


def answers(client: zmq.Socket[Any]) -> list[Any]:
    found = []
    while client.poll(0):
        found.append(TO_CLIENT.decode(client.recv()))
    return found


def check_encode(message: Encode) -> None:
    """That a tokenizer is given nothing but what the protocol allows."""
    PromptOptions.from_wire(message.options)
    assert all(isinstance(word, str) and 0 < len(word) <= 256 for word in message.words)
    assert message.prompt is None or (isinstance(message.prompt, str) and message.prompt)
    assert (message.prompt is not None) + (message.messages is not None) + bool(message.words) >= 1
    if message.messages is not None:
        check_messages(message.messages)


def assert_nothing_is_left(engine: OneThread) -> None:
    gateway, scheduler = engine.gateway, engine.scheduler.scheduler
    assert not gateway.requests.journal.entries
    assert not gateway.requests.journal.prompt_tokens
    assert not gateway.requests.admission.jobs
    assert not gateway.sessions.streams
    assert len(gateway.sessions) == 0
    assert not gateway.sessions.with_news()
    assert (scheduler.running, scheduler.waiting, scheduler.in_flight) == (0, 0, 0)
    assert scheduler.pool.available == scheduler.config.blocks
    scheduler.pool.check()
    assert not engine.detokenizer.streams


def test_mutated_messages_end_no_actor_leave_nothing_and_reach_the_tokenizer_only_checked(engine: OneThread) -> None:
    handle = engine.tokenizer.handlers[Encode]
    encodes = 0

    def checked(message: Encode) -> None:
        nonlocal encodes
        encodes += 1
        check_encode(message)
        handle(message)

    engine.tokenizer.handlers[Encode] = checked
    first = connect(engine.context, DOOR)
    first.send(TO_GATEWAY.encode(Hello("first", "")))
    first.send(TO_GATEWAY.encode(PLAIN))
    engine.settle()
    resolved = next(message for message in answers(first) if isinstance(message, Accepted)).resolved
    first.send(TO_GATEWAY.encode(Goodbye()))
    clients = [connect(engine.context, DOOR) for _ in range(4)]
    read = [0] * len(clients)
    seen: Counter[str] = Counter()
    mutator = Mutator(1, resolved)
    for number in range(0, IN_PROCESS, AT_ONCE):
        turn, which = divmod(number // AT_ONCE, len(clients))
        if turn % 8 == 0 and which < 3:  # the last one is never introduced, but by accident
            clients[which].close(linger=0)
            clients[which], read[which] = connect(engine.context, DOOR), 0
            clients[which].send(TO_GATEWAY.encode(Hello(f"c{which}", "")))
        client = clients[which]
        client.send(TO_GATEWAY.encode(Renew(read[which])))
        for _ in range(AT_ONCE):
            client.send(mutator.frame())
        engine.turn()
        for message in answers(client):
            seen[type(message).__name__] += 1
            if isinstance(message, Chunks):
                read[which] = message.number
            if isinstance(message, Failed):
                assert message.error["code"] in CODES
                assert message.error["message"]
                seen[message.error["code"]] += 1
        assert len(engine.gateway.sessions) <= len(clients)
        if number % (AT_ONCE * 64) == 0 or number + AT_ONCE >= IN_PROCESS:
            for one in clients:
                one.send(TO_GATEWAY.encode(Goodbye()))
            engine.settle()
            assert_nothing_is_left(engine)
    print(f"{IN_PROCESS} mutated messages, {encodes} prompts tokenized, answers: {dict(seen)}")
    assert seen["Accepted"] > IN_PROCESS / 50
    assert seen["invalid_request"] > IN_PROCESS / 20
    assert encodes > IN_PROCESS / 100
    assert {"malformed", "unknown_message", "version", "too_deep", "too_many_elements", "digest_mismatch", "duplicate_request"} <= set(seen)


def test_mutated_messages_over_a_real_socket_leave_an_engine_as_it_was() -> None:
    with Engine("tiny", executor="mock", max_open=64, max_running=8, max_message=20_000, lease=2.0) as engine:
        engine.wait(60)
        context: zmq.Context[Any] = zmq.Context()
        observer, client = (connect(context, engine.address) for _ in range(2))

        def status(holds: Any = lambda report: True) -> dict[str, Any]:
            for _ in range(100):
                observer.send(TO_GATEWAY.encode(Status(1)))
                while True:
                    assert observer.poll(20_000), "no answer"
                    message = TO_CLIENT.decode(observer.recv())
                    if isinstance(message, Report):
                        break
                if holds(message.report):
                    return dict(message.report)
                observer.poll(200)
            raise TimeoutError(f"it never came true of {message.report}")

        before = status(lambda report: len(report["actors"]) == 5)
        client.send(TO_GATEWAY.encode(Hello("first", "")))
        client.send(TO_GATEWAY.encode(PLAIN))
        resolved: dict[str, Any] = {}
        while not resolved and client.poll(20_000):
            message = TO_CLIENT.decode(client.recv())
            resolved = message.resolved if isinstance(message, Accepted) else {}
        mutator = Mutator(2, resolved)
        for number in range(OVER_SOCKETS):
            if number % 50 == 0:
                client.close(linger=1000)
                client = connect(context, engine.address)
                client.send(TO_GATEWAY.encode(Hello("first", "")))
                status()  # not faster than it answers
                answers(client)
            if number % 1000 == 999:
                client.send(b"\x00" * 50_000)  # ends the connection
            client.send(mutator.frame())
        client.close(linger=0)
        after = status(lambda report: not report["clients"] and report["scheduler"].get("steps") and not report["scheduler"]["running"])
        assert after["requests"]["open"] == 0
        assert after["scheduler"]["blocks_free"] == after["scheduler"]["blocks_total"]
        assert [row["incarnation"] for row in after["actors"]] == [row["incarnation"] for row in before["actors"]]
        assert after["requests"]["total"] > OVER_SOCKETS / 100
        context.destroy(linger=0)
