"""The loop that all actors have, and messages that come in another order than they were sent in."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from penstock.actors.actor import ADAPTERS, HEARTBEAT_S, Actor, Peer, Post
from penstock.actors.admission import Admission, Held
from penstock.actors.config import EngineConfig
from penstock.actors.detokenizer import DetokenizerActor
from penstock.actors.executor import ExecutorActor
from penstock.actors.jobs import Jobs
from penstock.actors.journal import Journal
from penstock.actors.log import open_log
from penstock.actors.mailbox import open_outbox
from penstock.actors.messages import (
    INSIDE,
    Drain,
    Emitted,
    Encode,
    Encoded,
    Find,
    Found,
    Heartbeat,
    Leave,
    Peers,
    Pin,
    Released,
    Step,
    StepDone,
    Stop,
)  # fmt: skip
from penstock.actors.protocol import Generate
from penstock.actors.request import OpenRequest
from penstock.actors.resolve import Model
from penstock.actors.scheduler import SchedulerActor
from penstock.actors.sessions import Session
from penstock.actors.tokenizer import TokenizerActor
from penstock.engine.lora.recipe import Wish


class Slow(Actor):
    kind = "slow"

    def start(self) -> dict[str, Any]:
        self.handlers[Drain] = lambda _: time.sleep(0.02)
        return {}


def test_an_actor_whose_messages_take_long_shows_its_progress_while_more_of_them_wait(tmp_path: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    supervisor = context.socket(zmq.PULL)
    supervisor.bind("inproc://supervisor")
    post = Post("slow", 0, 1, "inproc://slow", "inproc://supervisor", str(tmp_path), EngineConfig())
    actor = Slow(post, context, open_log("error", str(tmp_path / "log")))
    outbox = open_outbox(context, "inproc://slow")
    for message in [Drain()] * 150 + [Stop()]:
        outbox.send(INSIDE.encode(message))
    assert actor.run()
    beats = []
    while supervisor.poll(0):
        message = INSIDE.decode(supervisor.recv())
        if isinstance(message, Heartbeat):
            beats.append(message.progress)
    most = HEARTBEAT_S / 0.02 + 2
    assert len(beats) >= 3
    assert all(later - earlier <= most for earlier, later in pairwise(beats))
    context.destroy(linger=0)


# ── overtaking: a message that asks for an answer may come before the news of whoever wants it ──────────────────────────────────


def ids(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


class Inbox:
    """A peer of the actor under test, in several incarnations."""

    def __init__(self, context: zmq.Context[Any], kind: str, incarnation: int) -> None:
        self.row = (kind, 0, incarnation, f"inproc://{kind}.{incarnation}", True, {})
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(self.row[3])

    def read(self) -> list[Any]:
        got = []
        while self.socket.poll(20):
            got.append(INSIDE.decode(self.socket.recv()))
        return got


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def build(kind: type[Actor], context: zmq.Context[Any], tmp_path: Path) -> Actor:
    Inbox(context, "supervisor", 0)
    post = Post(kind.kind, 0, 9, "inproc://it", "inproc://supervisor.0", str(tmp_path), EngineConfig(executor="mock"))
    actor = kind(post, context, open_log("error", str(tmp_path / "log")))
    actor.start()
    return actor


def step(scheduler: int, number: int) -> Step:
    return Step(scheduler, 9, number, (), b"", b"", b"", ids(0), ids(0), ids(1), 1, b"\x01", ids(5))


def test_the_executor_answers_a_scheduler_that_it_has_not_heard_of_yet_once_it_has(context: Any, tmp_path: Path) -> None:
    executor = build(ExecutorActor, context, tmp_path)
    old, new = Inbox(context, "scheduler", 3), Inbox(context, "scheduler", 12)
    executor.handle(Peers((old.row,)))
    executor.handle(step(12, 0))
    executor.handle(Peers(()))  # the old one is gone
    executor.handle(step(12, 1))
    executor.handle(Peers((new.row,)))
    executor.handle(step(12, 2))
    executor.handle(step(3, 7))  # a last word of the old one
    assert [message.step for message in new.read() if isinstance(message, StepDone)] == [0, 1, 2]
    assert not old.read()


def test_the_executor_reports_that_it_prepares_and_what_opening_took(context: Any, tmp_path: Path) -> None:
    executor = build(ExecutorActor, context, tmp_path)
    assert executor.load().items() >= {"in_flight": 0, "preparing": True, "opening_s": {}}.items()
    executor.after()
    assert executor.load()["preparing"] is False


def test_the_tokenizer_answers_a_gateway_that_it_has_not_heard_of_yet_once_it_has(context: Any, tmp_path: Path) -> None:
    tokenizer = build(TokenizerActor, context, tmp_path)
    old, new = Inbox(context, "gateway", 4), Inbox(context, "gateway", 11)
    tokenizer.handle(Peers((old.row,)))
    tokenizer.handle(Encode((11 << 32) + 1, "Once", None, {}, ()))
    tokenizer.handle(Peers((new.row,)))
    answers = new.read()
    assert [type(message) for message in answers] == [Encoded]
    assert answers[0].job == (11 << 32) + 1
    assert not old.read()


def test_the_detokenizer_tells_a_new_gateway_of_its_streams_and_hears_no_scheduler_that_is_gone(context: Any, tmp_path: Path) -> None:
    detokenizer = build(DetokenizerActor, context, tmp_path)
    scheduler, gateway = Inbox(context, "scheduler", 12), Inbox(context, "gateway", 11)
    handle = (11 << 32) + 5
    opened = (handle, 2, {"stop": (), "skip_special_tokens": True}, ids(40, 41), ids())
    first = Emitted(12, 1, (opened,), b"", b"", b"", b"", (), (), ())
    token = Emitted(12, 2, (), array("q", [handle]).tobytes(), ids(2), ids(0), ids(300), (), (), ())
    stale = Emitted(3, 1, (), b"", b"", b"", b"", ((handle, 1, "length", {}),), (), ())
    detokenizer.handle(Peers((scheduler.row,)))
    detokenizer.handle(first)
    detokenizer.handle(token)
    assert not gateway.read()
    detokenizer.handle(Peers((scheduler.row, gateway.row)))
    detokenizer.handle(stale)
    released = gateway.read()
    assert all(isinstance(message, Released) for message in released)
    assert [message.number for message in released] == [1, 2]
    assert b"".join(message.ids for message in released) == ids(300)


def test_the_scheduler_keeps_what_is_pinned_until_it_is_known_where_it_is_now(context: Any, tmp_path: Path) -> None:
    scheduler, calls = build(SchedulerActor, context, tmp_path), list[tuple[str, bytes]]()
    scheduler.scheduler = SimpleNamespace(
        pin=lambda adapter, now: calls.append(("pin", adapter.digest)) or True, unpin=lambda digest: calls.append(("unpin", digest))
    )
    scheduler._pin(Pin(((b"one", 1, "/1"), (b"two", 2, "/2"), (b"three", 3, "/3")), (b"unknown",)))
    calls.clear()
    scheduler._pin(Pin(((b"four", 4, "/4"),), (b"two", b"unknown")))
    assert {digest for call, digest in calls if call == "unpin"} == {b"one", b"three"}
    assert [adapter.digest for adapter in scheduler.pinned] == [b"four", b"two"]
    scheduler._pin(Pin(((b"two", 2, "/new"),), ()))
    assert [(adapter.digest, adapter.path) for adapter in scheduler.pinned] == [(b"two", "/new")]


def test_a_tokenizer_that_dies_is_held_against_the_prompt_that_it_was_at() -> None:
    model = Model(name="m", digest="d", tokenizer="t", vocab_size=9, max_model_len=9, capacity=99, eos=(), defaults={})
    admission, session, journal = Admission(EngineConfig(), 1), Session("c", "", b"id", 0.0), Journal(1)
    for name in ("guilty", "behind it"):
        message = Generate(name, name, None, None, {}, {}, None, 0, "", None, None, None, None)
        admission.admit(OpenRequest(name, session, 0.0), message, model, journal, Held(), 0.0)
    given_up = []
    for incarnation in range(10, 13):
        peers = {("tokenizer", 0): Peer("tokenizer", 0, incarnation, "", True)}
        assert len(list(admission.jobs.to_send(peers))) == 2
        given_up += admission.jobs.reassign({})
    assert [job.request.id for job in given_up] == ["guilty"]
    assert [job.request.id for job in admission.jobs] == ["behind it"]


def test_whose_request_is_forgotten_tells_who_was_asked_for_its_adapter() -> None:
    jobs, peers = Jobs(4), {ADAPTERS: Peer("adapters", 0, 9, "", True)}
    for asked in (False, True):
        request = OpenRequest("r", Session("c", "", b"id", 0.0), 0.0)
        job = jobs.new(request, None, "", Wish(("one",)), None)
        jobs.keep(job, 1, 1)
        if asked:
            assert [type(message) for _, message in jobs.to_send(peers)] == [Find]
        jobs.forget(request)
        assert list(jobs.to_send(peers)) == ([(ADAPTERS, Leave(job.number))] if asked else [])
    answered = jobs.new(request, None, "", Wish(("one",)), None)
    jobs.keep(answered, 1, 1)
    assert len(list(jobs.to_send(peers))) == 1
    assert jobs.answered(Found(answered.number, (b"", 1, ""), None)) is answered
    assert not list(jobs.to_send(peers))


def test_what_was_tokenized_for_a_former_gateway_is_nobodys_prompt() -> None:
    model = Model(name="m", digest="d", tokenizer="t", vocab_size=9, max_model_len=9, capacity=99, eos=(), defaults={})
    message = Generate("r", "Once", None, None, {}, {}, None, 0, "", None, None, None, None)
    jobs = []
    for incarnation in (4, 5):
        admission = Admission(EngineConfig(), incarnation)
        request = OpenRequest("r", Session("c", "", b"id", 0.0), 0.0)
        jobs.append(admission.admit(request, message, model, Journal(incarnation), Held(), 0.0))
    assert admission.jobs.done(jobs[0].number) is None
    assert admission.jobs.done(next(iter(admission.jobs)).number) is jobs[1]
