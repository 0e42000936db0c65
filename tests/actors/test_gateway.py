"""The gateway, from outside: what it serves, what it refuses, and that nothing it is sent disturbs anyone else."""

import os
import struct
from array import array
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import zmq

from penstock.actors.protocol import Accepted, Cancel, Chunks, Failed, Goodbye, Hello, List, Listing, Renew
from penstock.actors.wire import VERSION
from penstock.clients.launcher import Engine


def ids(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def collect(raw: Any, request: str) -> tuple[list[int], str]:
    """Ids and text of a request with one stream, and that its chunks and its one end are in order."""
    accepted = raw.wait(Accepted, lambda message: message.request == request)
    stream, tokens, text = accepted.streams[0], [], ""
    while True:
        chunks = raw.wait(Chunks)
        at = 0
        buffer = array("i", chunks.ids)
        for number, count, piece in zip(array("i", chunks.streams), array("i", chunks.counts), chunks.texts, strict=True):
            if number == stream:
                tokens += buffer[at : at + count].tolist()
                text += piece
            at += count
        if any(row[0] == request for row in chunks.done):
            assert [row[1] for row in chunks.ends if row[0] == stream] == ["length"]
            return tokens, text


def test_a_request_is_accepted_streamed_and_done_once(raw: Any) -> None:
    raw.generate("r", prompt="The list method", params={"max_tokens": 20})
    tokens, text = collect(raw, "r")
    assert len(tokens) == 20
    assert text
    assert sum(row[0] == "r" for message in raw.got if isinstance(message, Chunks) for row in message.done) == 1


def test_accepted_returns_a_value_with_no_open_default(raw: Any) -> None:
    raw.generate("r", ids=ids(1, 2, 3), params={"max_tokens": 4})
    resolved = raw.wait(Accepted).resolved
    assert resolved["prompt"] == ids(1, 2, 3)
    assert isinstance(resolved["params"]["seed"], int)
    assert {"temperature", "max_tokens"} <= set(resolved["params"])
    assert len(resolved["model"]) > 0
    assert len(resolved["tokenizer"]) == 64


def test_a_request_resumes_by_its_value_on_another_connection(raw: Any, connect: Callable[[str], Any], engine: Engine) -> None:
    raw.generate("r", ids=ids(5, 6, 7), params={"max_tokens": 30, "seed": 1})
    resolved = raw.wait(Accepted).resolved
    raw.send(Cancel(("r",)))
    other = connect(engine.address)
    other.hello()
    other.generate("whole", ids=ids(5, 6, 7), params={"max_tokens": 30, "seed": 1})
    whole, text = collect(other, "whole")
    other.generate("rest", resume={**resolved, "received": (ids(*whole[:12]),)})
    rest, rest_text = collect(other, "rest")
    assert whole[12:] == rest
    assert text.endswith(rest_text)


def test_resuming_against_another_model_is_a_typed_error(raw: Any) -> None:
    raw.generate("r", ids=ids(5, 6, 7), params={"max_tokens": 3})
    resolved = raw.wait(Accepted).resolved
    raw.generate("s", resume={**resolved, "model": "another", "received": (b"",)})
    assert raw.failure("s")["code"] == "digest_mismatch"


@pytest.mark.parametrize(
    ("values", "code", "field"),
    [
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"ids": b""}, "invalid_request", "prompt"),
        ({"ids": b"\x00\x00"}, "invalid_request", "ids"),
        ({"ids": ids(10**6)}, "invalid_request", "ids"),
        ({"ids": ids(-1)}, "invalid_request", "ids"),
        ({"ids": ids(1), "prompt": "a"}, "invalid_request", "prompt"),
        ({}, "invalid_request", "prompt"),
        ({"ids": ids(1), "params": {"temperature": float("nan")}}, "invalid_request", "temperature"),
        ({"ids": ids(1), "params": {"temperature": "hot"}}, "invalid_request", "temperature"),
        ({"ids": ids(1), "params": {"top_p": 0}}, "invalid_request", "top_p"),
        ({"ids": ids(1), "params": {"max_tokens": 0}}, "invalid_request", "max_tokens"),
        ({"ids": ids(1), "params": {"max_tokens": True}}, "invalid_request", "max_tokens"),
        ({"ids": ids(1), "params": {"colour": 1}}, "invalid_request", "colour"),
        ({"ids": ids(1), "params": {"stop_token_ids": [10**6]}}, "invalid_request", "stop_token_ids"),
        ({"ids": ids(1), "params": {"logit_bias": [[10**6, 1.0]]}}, "invalid_request", "logit_bias"),
        ({"ids": ids(1), "params": {"stop": [""]}}, "invalid_request", "stop[0]"),
        ({"ids": ids(1), "options": {"colour": 1}}, "invalid_request", "colour"),
        ({"ids": ids(1), "deadline": -1.0}, "invalid_request", "deadline"),
        ({"ids": ids(1), "priority": 2**40}, "invalid_request", "priority"),
        ({"ids": ids(1), "adapter": "pirate"}, "unknown_adapter", "adapter"),
        ({"ids": ids(*range(2, 5)) * 11_000}, "too_large", None),
        ({"messages": ({"role": "user"},)}, "invalid_request", "messages"),
        ({"messages": ("hello",)}, "invalid_request", "messages"),
        ({"resume": {}}, "digest_mismatch", "resume.model"),
    ],
)
def test_bad_input_gets_a_typed_error_that_names_the_field(raw: Any, values: dict[str, Any], code: str, field: str | None) -> None:
    raw.generate("bad", **values)
    error = raw.failure(None if code == "too_large" else "bad")
    assert error["code"] == code
    if field is not None:
        assert str(error["field"]).startswith(field)
    assert error["message"]
    raw.generate("good", ids=ids(1, 2), params={"max_tokens": 3})
    assert raw.done("good")["generated_tokens"] == 3


def test_a_prompt_that_can_never_fit_is_refused_with_the_limit(engine: Engine, connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", max_running=1) as small:
        small.wait(60)
        raw = connect(small.address)
        raw.hello()
        raw.generate("long", ids=ids(*([1] * 5000)))
        error = raw.failure("long")
        assert error["code"] == "prompt_too_long"
        assert "4096" in error["limit"]


def test_an_id_of_an_open_request_is_refused_and_of_another_client_is_not(raw: Any, connect: Callable[[str], Any], engine: Engine) -> None:
    raw.generate("same", ids=ids(1, 2), params={"max_tokens": 20_000})
    raw.wait(Accepted)
    raw.generate("same", ids=ids(1, 2))
    assert raw.failure("same")["code"] == "duplicate_request"
    other = connect(engine.address)
    other.hello()
    other.generate("same", ids=ids(1, 2), params={"max_tokens": 2})
    assert other.done("same")["generated_tokens"] == 2
    raw.send(Cancel(("same", "unknown")))
    raw.send(Cancel(("same",)))
    raw.done("same")


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "malformed"),
        (b"\xc1\xc1\xc1", "malformed"),
        (msgpack.packb([VERSION + 1, 1, "c", "n"]), "version"),
        (msgpack.packb([VERSION, 200]), "unknown_message"),
        (msgpack.packb([VERSION, 2, "r"]), "malformed"),
        (msgpack.packb([VERSION, 4, 0])[:-1], "malformed"),
        (b"\x93\x01\x03" + b"\x91" * 5000, "too_deep"),
        (b"\x93\x01\x03\xdd" + struct.pack(">I", 2**31), "too_many_elements"),
        (b"\x93\x01\x03\xdd" + struct.pack(">I", 90_000) + b"\x90" * 90_000, "too_many_elements"),
        (msgpack.packb([VERSION, 3, ["x" * 150_000]]), "too_large"),
    ],
)
def test_rubbish_is_answered_and_disturbs_nobody(raw: Any, frame: bytes, code: str) -> None:
    raw.generate("running", ids=ids(1, 2), params={"max_tokens": 2000})
    raw.send(frame)
    assert raw.failure(None)["code"] == code
    assert raw.done("running")["generated_tokens"] == 2000


def test_several_frames_are_no_message(raw: Any) -> None:
    raw.socket.send_multipart([b"a", b"b"])
    assert raw.failure(None)["code"] == "malformed"


def test_a_message_beyond_twice_the_limit_ends_the_connection_and_the_requests_resume(raw: Any) -> None:
    raw.generate("r", ids=ids(1, 2), params={"max_tokens": 20_000})
    raw.wait(Accepted)
    raw.send(os.urandom(300_000))
    raw.hello()  # on the connection that the socket makes by itself
    raw.send(List(1))
    assert [row["request"] for row in raw.wait(Listing).requests] == ["r"]
    raw.send(Cancel(("r",)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"priority": 2**64 - 1}, "priority"), ({"priority": 2**62 + 1}, "priority"), ({"priority": True}, "priority"),
        ({"tenant": "t" * 500}, "tenant"), ({"received": (ids(*range(2, 102)),)}, "resume.received"), ({"received": ()}, "resume.received"),
    ],
)  # fmt: skip
def test_a_resolved_value_is_judged_like_any_other_input(raw: Any, change: dict[str, Any], field: str) -> None:
    raw.generate("r", ids=ids(5, 6, 7), params={"max_tokens": 3})
    resolved = raw.wait(Accepted).resolved
    raw.generate("s", resume={**resolved, "received": (b"",), **change})
    assert raw.failure("s")["field"] == field


def test_a_request_with_more_variants_of_bad_words_than_may_be_given_can_be_resumed(raw: Any) -> None:
    raw.generate("r", prompt="hello", params={"max_tokens": 3, "bad_words": [f"word{number}" for number in range(200)]})
    resolved = raw.wait(Accepted).resolved
    assert len(resolved["words"]) > 256
    raw.generate("s", resume={**resolved, "received": (b"",)})
    assert raw.done("s")["generated_tokens"] == 3


def test_a_request_that_is_said_again_on_a_new_connection_begins_anew(raw: Any, connect: Callable[[str], Any], engine: Engine) -> None:
    raw.generate("job", ids=ids(1, 2, 3), params={"max_tokens": 5})
    raw.done("job")
    again = connect(engine.address)
    again.name = raw.name
    again.hello()
    again.generate("job", ids=ids(*range(2, 52)), params={"max_tokens": 4})
    assert again.wait(Accepted).resolved["prompt"] == ids(*range(2, 52))
    assert again.done("job")["generated_tokens"] == 4


def test_resuming_with_other_ids_than_were_released_ends_the_request(raw: Any, connect: Callable[[str], Any], engine: Engine) -> None:
    raw.generate("job", ids=ids(1, 2, 3), params={"max_tokens": 20_000})
    resolved = raw.wait(Accepted).resolved
    again = connect(engine.address)
    again.name = raw.name
    again.hello()
    again.generate("job", resume={**resolved, "received": (ids(9, 9, 9),)})
    assert again.failure("job")["field"] == "resume.received"
    again.send(List(1))
    assert again.wait(Listing).requests == ()


def test_a_request_ends_once_however_many_of_its_samples_fail(connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", tokenizer="none") as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        raw.generate("r", ids=ids(1, 2), params={"n": 8, "stop": ["a"]})
        assert raw.failure("r")["field"] == "stop"
        raw.generate("text", prompt="hello")
        assert raw.failure("text")["code"] == "invalid_request"
        raw.generate("good", ids=ids(1, 2), params={"max_tokens": 2})
        raw.done("good")
        assert [message.request for message in raw.got if isinstance(message, Failed)] == ["r", "text"]


def test_what_a_client_does_not_acknowledge_counts_against_it(raw: Any) -> None:
    raw.credit = False
    for number in range(260):
        raw.generate(f"r{number}", ids=ids(1, 2), params={"max_tokens": 1})
    assert raw.wait(Failed).error["code"] == "overloaded"


def test_contradictions_that_leave_no_token_are_refused(raw: Any) -> None:
    raw.generate("a", ids=ids(1), params={"allowed_tokens": [50], "bad_words": [[50]]})
    assert raw.failure("a")["field"] == "allowed_tokens"
    raw.generate("b", ids=ids(1), params={"allowed_tokens": [5], "stop_token_ids": [5], "min_tokens": 2})
    assert raw.failure("b")["field"] == "allowed_tokens"


def test_random_bytes_end_nothing(raw: Any, engine: Engine) -> None:
    for size in range(1, 200):
        raw.send(os.urandom(size))
    raw.generate("r", ids=ids(1), params={"max_tokens": 2})
    assert raw.done("r")["generated_tokens"] == 2
    assert engine.status is None
    assert all(row["incarnation"] <= 5 for row in raw.status()["actors"])


def test_who_did_not_say_hello_is_told_so(engine: Engine, connect: Callable[[str], Any]) -> None:
    stranger = connect(engine.address)
    stranger.generate("r", ids=ids(1))
    stranger.wait(Goodbye)


def test_a_hello_must_name_a_client(engine: Engine, connect: Callable[[str], Any]) -> None:
    stranger = connect(engine.address)
    stranger.send(Hello("", "nobody"))
    assert stranger.failure(None)["code"] == "malformed"


def test_a_client_that_vanishes_gives_its_blocks_back(raw: Any, connect: Callable[[str], Any], engine: Engine) -> None:
    gone = connect(engine.address)
    gone.hello()
    gone.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000, "n": 4})
    gone.wait(Accepted)
    gone.socket.close(linger=0)
    report = raw.until(lambda report: report["clients"] == 1 and not report["scheduler"].get("running", 1))
    assert report["scheduler"]["blocks_free"] == report["scheduler"]["blocks_total"]


def test_more_streams_than_are_allowed_are_refused_at_once_with_a_time_to_come_back(raw: Any) -> None:
    for name in ("first", "second"):
        raw.generate(name, ids=ids(1, 2), params={"max_tokens": 20_000, "n": 126})
        raw.wait(Accepted)
    raw.generate("third", ids=ids(1, 2), params={"n": 5})
    error = raw.failure("third")
    assert error["code"] == "overloaded"
    assert error["retryable"]
    assert error["retry_after"] > 0
    raw.send(Cancel(("first", "second")))
    raw.done("first")


def test_a_reader_that_gives_no_credit_gets_no_more_than_the_window_and_then_everything(raw: Any) -> None:
    raw.credit = False
    whole = raw.status()["tokens"]["generated"] + 20_000
    raw.generate("r", ids=ids(1, 2), params={"max_tokens": 20_000})
    raw.until(lambda report: report["tokens"]["generated"] >= whole)
    before = [message for message in raw.got if isinstance(message, Chunks)]
    assert len(before) <= 64
    raw.credit = True
    raw.send(Renew(before[-1].number))
    usage = raw.done("r")
    assert usage["generated_tokens"] == 20_000
    chunks = [message for message in raw.got if isinstance(message, Chunks)]
    assert sum(sum(array("i", message.counts)) for message in chunks) == 20_000


def test_a_deadline_ends_a_stream_with_its_own_reason(raw: Any) -> None:
    raw.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000}, deadline=0.2)
    stream = raw.wait(Accepted).streams[0]
    chunks = raw.wait(Chunks, lambda message: bool(message.ends))
    assert [(row[0], row[1]) for row in chunks.ends] == [(stream, "deadline")]


def test_a_client_that_was_silent_for_too_long_is_told_that_its_lease_expired(raw: Any) -> None:
    raw.credit = False
    raw.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000})
    assert raw.failure("r")["code"] == "lease_expired"
    raw.send(Renew(0))
    raw.wait(Goodbye)


def test_samples_end_one_by_one_and_the_request_once(raw: Any) -> None:
    raw.generate("r", prompt="hello", params={"max_tokens": 5, "n": 3})
    streams = raw.wait(Accepted).streams
    assert raw.done("r")["generated_tokens"] == 15
    ends = [row[0] for message in raw.got if isinstance(message, Chunks) for row in message.ends]
    assert sorted(ends) == sorted(streams)


def test_the_socket_folder_is_private(engine: Engine) -> None:
    path = engine.address.removeprefix("ipc://")
    assert os.stat(os.path.dirname(path)).st_mode & 0o077 == 0
    assert len(path) < zmq.IPC_PATH_MAX_LEN
