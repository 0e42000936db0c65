"""The protocol machine, driven with plain values: whatever happens to its links, the same streams come out."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.actors import protocol as wire
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY
from penstock.clients.connection import Connection
from penstock.clients.control import Restart, drain
from penstock.clients.errors import (
    ClientClosed,
    ConnectionLost,
    DigestMismatch,
    DuplicateRequest,
    MessageTooLarge,
    Overloaded,
    PenstockError,
    ProtocolError,
    Unauthorized,
    VersionMismatch,
)  # fmt: skip
from penstock.clients.inbox import Inbox, restore
from penstock.clients.order import build

from .fake import FakeGateway, expected, text_of


def nothing() -> None:
    pass


class Wired:
    """A connection, a fake gateway, and the frames between them, moved by hand."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.gateway = FakeGateway(**options)
        self.connection = Connection("me", "test", 30.0, 0.0)
        self.now, self.link = 0.0, 0
        self.inbound: list[tuple[int, bytes]] = []
        self.woken: list[Any] = []

    def open(self, prompt: str, **params: Any) -> Inbox:
        inbox = Inbox(build(prompt, **params), nothing, self.now)
        self.connection.start(inbox, self.now)
        return inbox

    def tick(self, seconds: float = 0.01) -> None:
        self.now += seconds
        self.woken += self.connection.tick(self.now)

    def move(self, deliver: bool = True) -> None:
        if self.connection.reopen and self.now >= self.connection.reopen_at:
            self.link += 1
            self.inbound.clear()
            self.connection.opened(self.now)
        if self.connection.reopen:
            return
        while self.connection.outbox:
            self.inbound += self.gateway.receive(self.link, self.connection.outbox.popleft())
        if deliver:
            arrived, self.inbound = self.inbound, []
            for link, frame in arrived:
                if link == self.link and not self.connection.reopen:
                    self.woken += self.connection.receive(frame, self.now)

    def serve(self, rng: random.Random) -> None:
        self.inbound += self.gateway.step(rng)


def settled(**options: Any) -> Wired:
    wired = Wired(**options)
    wired.move()
    assert wired.connection.ready
    return wired


def finish(wired: Wired, *inboxes: Inbox) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        wired.tick()
        wired.move()
        wired.serve(rng)
        if all(inbox.over for inbox in inboxes):
            return
    raise AssertionError("the streams did not end")


Plan = list[tuple[str, int]]
events = st.sampled_from(["serve", "serve", "serve", "move", "move", "read", "read", "lose", "forget", "restart", "drop", "tick"])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    requests=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=5),
    schedule=st.lists(st.tuples(events, st.integers(0, 4)), max_size=120),
    window=st.integers(1, 9),
)
def test_any_interleaving_of_chunks_reads_losses_and_restarts_gives_the_same_streams(
    seed: int, requests: list[tuple[int, int]], schedule: list[tuple[str, int]], window: int
) -> None:
    rng = random.Random(seed)
    wired = Wired(window=window)
    inboxes = [wired.open(f"prompt {index}", n=n, max_tokens=limit) for index, (n, limit) in enumerate(requests)]
    read: list[list[list[int]]] = [[[] for _ in range(n)] for n, _ in requests]
    texts = [["" for _ in range(n)] for n, _ in requests]
    ends = [[0 for _ in range(n)] for n, _ in requests]

    def take(index: int) -> None:
        while (chunk := inboxes[index].take()) is not None:
            read[index][chunk.sample] += chunk.ids
            texts[index][chunk.sample] += chunk.text
            ends[index][chunk.sample] += chunk.finish_reason is not None

    for engine, (event, which) in enumerate(schedule):
        if event == "serve":
            wired.serve(rng)
        elif event == "move":
            wired.move()
        elif event == "read":
            take(which % len(inboxes))
        elif event == "lose":
            wired.connection.lost(wired.now)
        elif event == "forget" and wired.link in wired.gateway.connections:
            wired.gateway.forget(wired.link)
        elif event == "restart":
            wired.gateway = FakeGateway(engine=f"engine {engine}", window=window)
            wired.connection.lost(wired.now)
        elif event == "drop" and wired.inbound:
            dropped = wired.inbound[which % len(wired.inbound)]
            if isinstance(TO_CLIENT.decode(dropped[1]), wire.Chunks):
                wired.inbound.remove(dropped)
        elif event == "tick":
            wired.tick(which * 1.1)
    # A lost last message leaves nothing to notice but silence, which takes a lease each way.
    for _ in range(4000):
        wired.move()
        wired.serve(rng)
        wired.tick(0.5)
        if all(inbox.over for inbox in inboxes):
            break
    for index, (n, limit) in enumerate(requests):
        assert inboxes[index].over
        assert inboxes[index].error is None
        take(index)
        for sample in range(n):
            assert read[index][sample] == expected(f"prompt {index}", sample, limit)
            assert texts[index][sample] == text_of(read[index][sample])
            assert ends[index][sample] == 1
    assert not wired.connection._inboxes
    assert not wired.connection._streams


def test_hello_is_said_first_and_requests_wait_for_the_welcome() -> None:
    wired = Wired(ready=False)
    inbox = wired.open("a", max_tokens=3)
    wired.move()
    assert [type(message) for message in wired.gateway.heard] == [wire.Hello]
    wired.inbound += wired.gateway.get_ready()
    wired.move()
    finish(wired, inbox)
    assert inbox.completion().ids == expected("a", 0, 3)


def test_the_lease_is_renewed_at_a_third_and_chunks_are_acknowledged_at_a_quarter_of_the_window() -> None:
    wired = settled(lease=9.0, window=8)
    assert wired.connection.due == pytest.approx(3.0)
    wired.tick(2.9)
    assert not wired.connection.outbox
    wired.tick(0.2)
    wired.move()
    assert wired.gateway.heard[-1] == wire.Renew(0)
    columns = (array("i").tobytes(),) * 3
    for number in (1, 2):
        wired.connection.receive(TO_CLIENT.encode(wire.Chunks(number, *columns, (), (), (), ())), wired.now)
    wired.move()
    assert wired.gateway.heard[-1] == wire.Renew(2)


def test_silence_is_asked_about_after_a_lease_and_believed_after_two() -> None:
    wired = settled(lease=6.0)
    inbox = wired.open("a", max_tokens=2)
    wired.move()
    wired.gateway.deaf = True
    for _ in range(4):
        wired.tick(2.0)
        wired.move()
    assert not wired.connection.reopen
    for _ in range(4):
        wired.tick(2.0)
        wired.move()
    assert wired.link >= 2
    wired.gateway.deaf = False
    wired.connection.lost(wired.now)
    finish(wired, inbox)
    assert inbox.completion().ids == expected("a", 0, 2)


def test_a_client_that_slept_does_not_take_its_own_silence_for_the_engines() -> None:
    wired = settled(lease=1.0)
    wired.open("a", max_tokens=2)
    wired.move()
    wired.tick(60.0)
    assert not wired.connection.reopen
    wired.move()
    wired.tick(0.1)
    assert not wired.connection.reopen


def test_a_connection_that_is_sent_away_again_and_again_slows_down() -> None:
    wired = settled()
    pauses = []
    for _ in range(8):
        wired.connection.receive(TO_CLIENT.encode(wire.Goodbye()), wired.now)
        pauses.append(wired.connection.reopen_at - wired.now)
        wired.now = wired.connection.reopen_at
        wired.move()
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2.0


def test_requests_fail_when_patience_is_lost_and_can_be_saved() -> None:
    wired = settled()
    inbox = wired.open("a", max_tokens=50)
    rng = random.Random(1)
    for _ in range(6):
        wired.move()
        wired.serve(rng)
    wired.move()
    wired.connection.lost(wired.now)
    wired.tick(29)
    assert not inbox.over
    wired.tick(2)
    assert isinstance(inbox.error, ConnectionLost)
    assert inbox.error.retryable
    saved = inbox.save()
    other = settled()
    again = restore(saved, nothing, 0.0)
    other.connection.start(again, 0.0)
    finish(other, again)
    assert again.completion().ids == expected("a", 0, 50)
    assert again.completion().text == text_of(expected("a", 0, 50))
    assert 0 < len(inbox.tracks[0].ids) < 50


def test_a_request_saved_before_it_was_accepted_begins_anew() -> None:
    wired = Wired()
    saved = wired.open("a", max_tokens=5).save()
    other = settled()
    again = restore(saved, nothing, 0.0)
    other.connection.start(again, 0.0)
    finish(other, again)
    assert again.completion().ids == expected("a", 0, 5)


def test_an_expired_lease_is_resumed_rather_than_raised() -> None:
    wired = settled()
    inbox = wired.open("a", max_tokens=9)
    wired.move()
    wired.connection.receive(TO_CLIENT.encode(wire.Failed(inbox.request, {"code": "lease_expired", "message": ""})), wired.now)
    finish(wired, inbox)
    assert inbox.completion().ids == expected("a", 0, 9)


def test_a_typed_error_ends_its_own_request_only() -> None:
    wired = settled()
    wired.gateway.refuse["bad"] = [{"code": "overloaded", "message": "full", "retry_after": 1.5, "retryable": True}]
    bad, good = wired.open("bad"), wired.open("good", max_tokens=4)
    finish(wired, bad, good)
    assert isinstance(bad.error, Overloaded)
    assert (bad.error.retry_after, bad.error.request) == (1.5, bad.request)
    assert good.completion().ids == expected("good", 0, 4)


def test_an_engine_too_busy_to_resume_is_asked_again_for_what_had_begun() -> None:
    wired = settled()
    inbox, other = wired.open("a", max_tokens=9), wired.open("b", max_tokens=9)
    wired.move()
    wired.gateway.refuse["a"] = wired.gateway.refuse["b"] = [{"code": "overloaded", "message": "full", "retry_after": 5.0}] * 4
    wired.connection.lost(wired.now)
    for _ in range(5):
        wired.tick(0.2)
        wired.move()
    assert not inbox.over
    assert wired.connection.cancel([other.request], wired.now) == [other]
    assert wired.connection.due < wired.now + 5.0
    for _ in range(30):
        wired.tick(1.0)
        wired.move()
    finish(wired, inbox)
    assert inbox.completion().ids == expected("a", 0, 9)


def test_a_message_that_was_not_understood_fails_only_what_was_not_answered() -> None:
    wired = settled()
    running = wired.open("a", max_tokens=5)
    wired.move()
    unheard = wired.open("b")
    wired.connection.receive(TO_CLIENT.encode(wire.Failed(None, {"code": "malformed", "message": "?"})), wired.now)
    assert isinstance(unheard.error, ProtocolError)
    finish(wired, running)
    assert running.completion().ids == expected("a", 0, 5)


def test_cancelling_ends_a_request_once_and_is_harmless_twice() -> None:
    wired = settled()
    inbox = wired.open("a", max_tokens=10_000)
    wired.move()
    wired.connection.cancel([inbox.request, "unknown"], wired.now)
    wired.connection.cancel([inbox.request], wired.now)
    finish(wired, inbox)
    assert inbox.completion().finish_reason == "cancelled"
    assert not wired.gateway.served


def test_cancelling_without_an_engine_ends_the_request_and_tells_the_engine_later() -> None:
    wired = settled()
    inbox = wired.open("a", n=2, max_tokens=10_000)
    wired.move()
    wired.connection.lost(wired.now)
    assert wired.connection.cancel([inbox.request], wired.now) == [inbox]
    assert [sample.finish_reason for sample in inbox.completion().samples] == ["cancelled", "cancelled"]
    wired.tick(1.0)
    wired.move()
    wired.move()
    assert wired.gateway.heard[-1] == wire.Cancel((inbox.request,))


def test_a_request_id_is_used_once_at_a_time() -> None:
    wired = settled()
    inbox = wired.open("a", request="mine", max_tokens=2)
    with pytest.raises(DuplicateRequest):
        wired.open("b", request="mine")
    finish(wired, inbox)
    finish(wired, wired.open("b", request="mine", max_tokens=2))


def test_a_message_above_the_engines_limit_is_refused_here() -> None:
    wired = settled(limits={"message": 500})
    with pytest.raises(MessageTooLarge) as caught:
        wired.open("x" * 500)
    assert caught.value.limit == "500"
    early = Wired(limits={"message": 500})
    inbox = early.open("x" * 500)
    early.move()
    assert isinstance(inbox.error, MessageTooLarge)


def test_the_remaining_time_travels_with_a_resumed_request() -> None:
    wired = settled()
    inbox = wired.open("a", deadline=10.0, queue_timeout=3.0)
    wired.move()
    wired.now = 4.0
    wired.connection.lost(wired.now)
    wired.now = 5.0
    wired.move()
    wired.move()
    sent = [message for message in wired.gateway.heard if isinstance(message, wire.Generate)][-1]
    assert sent.resume is not None
    assert sent.request == inbox.request
    assert (sent.deadline, sent.queue_timeout) == (5.0, None)


@pytest.mark.parametrize("frame", [b"", b"\x92", b"\x92\x02\x01", b"garbage", b"\x92\x01\xc1", TO_CLIENT.encode(wire.Goodbye()) + b"x"])
def test_bytes_that_are_no_message_fail_everything_with_a_typed_error(frame: bytes) -> None:
    wired = settled()
    inbox = wired.open("a")
    assert inbox in wired.connection.receive(frame, wired.now)
    assert isinstance(inbox.error, ProtocolError)
    with pytest.raises(ProtocolError):
        wired.open("b")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"\x99\x01\x03" + tail))
def test_no_bytes_raise_out_of_the_machine(frame: bytes) -> None:
    wired = settled()
    wired.open("a")
    wired.connection.receive(frame, wired.now)


def test_an_engine_of_another_version_is_a_version_mismatch() -> None:
    wired = Wired()
    inbox = wired.open("a")
    wired.connection.opened(0.0)
    wired.connection.receive(TO_CLIENT.encode(wire.Failed(None, {"code": "version", "message": "speak 2"})), 0.0)
    assert isinstance(inbox.error, VersionMismatch)


def test_another_number_of_samples_than_before_is_a_protocol_error() -> None:
    wired = settled()
    inbox = wired.open("a", n=2)
    wired.move()
    wired.connection.receive(TO_CLIENT.encode(wire.Accepted(inbox.request, (1,), {})), wired.now)
    assert isinstance(inbox.error, ProtocolError)


def test_closing_says_goodbye_and_fails_what_is_open() -> None:
    wired = settled()
    inbox = wired.open("a")
    wired.move()
    assert wired.connection.close(wired.now) == [inbox]
    assert isinstance(inbox.error, ClientClosed)
    assert TO_GATEWAY.decode(wired.connection.outbox[-1]) == wire.Goodbye()


def test_questions_are_answered_also_over_a_new_link() -> None:
    wired = settled()
    wired.gateway.deaf = True
    query = wired.connection.ask(wire.List, nothing, wired.now)
    wired.move()
    wired.gateway.deaf = False
    wired.connection.lost(wired.now)
    wired.tick(1.0)
    wired.move()
    wired.move()
    assert query.answer == ()
    assert query in wired.woken


def test_an_order_that_is_refused_is_the_error_of_its_own_question_only() -> None:
    wired = settled()
    order, question = (wired.connection.ask(kind, nothing, wired.now) for kind in (drain, wire.Status))
    refused = wire.Report(order.message.query, {"error": {"code": "unauthorized", "message": "no"}})
    assert wired.connection.receive(TO_CLIENT.encode(refused), wired.now) == [order]
    assert isinstance(order.error, Unauthorized)
    wired.move()
    assert question.answer == {"state": "ready"}


def test_an_engine_that_knows_no_orders_fails_them_and_nothing_else() -> None:
    wired = settled()
    inbox, order = wired.open("a", max_tokens=5), wired.connection.ask(drain, nothing, wired.now)
    answer = wire.Failed(None, {"code": "unknown_message", "message": "no message has the tag 8"})
    assert wired.connection.receive(TO_CLIENT.encode(answer), wired.now) == [order]
    assert isinstance(order.error, ProtocolError)
    finish(wired, inbox)
    assert inbox.error is None


def test_an_actor_counts_as_replaced_once_a_later_start_of_it_is_ready() -> None:
    def report(incarnation: int, state: str = "ready") -> dict[str, Any]:
        return {"actors": [{"kind": "tokenizer", "index": 1, "incarnation": incarnation, "state": state}]}

    restart = Restart("tokenizer/1")
    assert restart.take({"actors": []}) is None  # a gateway that was not told yet who is there
    assert restart.question(1) == wire.Status(1)
    assert restart.take(report(5)) is None
    assert restart.question(2) == wire.Control(2, "restart", "tokenizer/1", 5)
    for answer in (report(5, "restarting"), {"actors": []}, report(6, "starting")):
        assert restart.take(answer) is None
    assert restart.question(3) == wire.Control(3, "restart", "tokenizer/1", 5)
    assert restart.take(report(7)) == report(7)["actors"][0]


def test_a_request_cancelled_before_it_began_is_cancelled_not_failed() -> None:
    wired = settled()
    inbox = wired.open("a")
    wired.connection.cancel([inbox.request], wired.now)
    error = {"code": "not_found", "message": "cancelled before it began"}
    wired.connection.receive(TO_CLIENT.encode(wire.Failed(inbox.request, error)), wired.now)
    assert inbox.completion().finish_reason == "cancelled"


def test_only_readers_that_wait_are_woken_for_news() -> None:
    wired = settled()
    reader, quiet = wired.open("a", max_tokens=3), wired.open("b", max_tokens=3)
    wired.move()
    reader.waiting = True
    for rng in map(random.Random, range(50)):
        wired.serve(rng)
        wired.move()
    assert wired.woken.count(reader) >= 2
    assert wired.woken.count(quiet) == 1  # its end


def test_errors_of_another_engine_are_kept() -> None:
    wired = settled()
    wired.gateway.refuse["a"] = [{"code": "digest_mismatch", "message": "other model"}, {"code": "brand_new", "message": "?", "field": 3}]
    first = wired.open("a")
    wired.move()
    wired.move()
    second = wired.open("a")
    wired.move()
    wired.move()
    assert isinstance(first.error, DigestMismatch)
    assert type(second.error) is PenstockError
    assert (second.error.code, second.error.field) == ("brand_new", None)
