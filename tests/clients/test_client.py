"""The clients and a whole engine with the mock executor: whatever a user does, the answer is the text or a typed error."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.actors import protocol as wire
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY
from penstock.clients import AsyncClient, Client, Completion, Engine, SamplingParams, alaunch, launch
from penstock.clients.errors import (
    ConnectionLost,
    DigestMismatch,
    InvalidRequest,
    MessageTooLarge,
    ModelError,
    PenstockError,
    PromptTooLong,
    StartError,
    UnknownAdapter,
)

LONG = 100_000


def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def test_chunks_add_up_to_the_completion(client: Client) -> None:
    whole = client.generate("Hello there", max_tokens=50, ignore_eos=True)
    chunks = list(client.stream("Hello there", max_tokens=50, ignore_eos=True))
    assert [id for chunk in chunks for id in chunk.ids] == whole.ids
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len(whole.ids) == 50
    assert (chunks[-1].finish_reason, whole.finish_reason) == ("length", "length")
    assert {chunk.finish_reason for chunk in chunks[:-1]} <= {None}


def test_usage_counts_tokens_and_times_every_hop(client: Client) -> None:
    completion = client.generate("Hello there", max_tokens=20, n=2, ignore_eos=True)
    usage = completion.usage
    assert usage.prompt_tokens == len(completion.prompt_ids) > 0
    assert usage.generated_tokens == 40
    assert 0 < usage.total_s < 60
    assert all(getattr(usage, name) >= 0 for name in ("tokenize_s", "queue_s", "prefill_s", "decode_s"))


def test_a_seed_is_drawn_and_told(client: Client) -> None:
    first = client.generate("Hello", max_tokens=5)
    assert first.seed is not None
    assert client.generate("Hello", max_tokens=5, seed=first.seed).ids == first.ids
    assert client.generate("Hello", max_tokens=5, params=SamplingParams(seed=3)).seed == 3


def test_prompts_are_text_ids_or_chats(client: Client) -> None:
    assert client.generate([5, 6, 7], max_tokens=3).prompt_ids == [5, 6, 7]
    assert client.chat([{"role": "user", "content": "Hi"}], max_tokens=3).usage.prompt_tokens > 3
    assert client.generate("some text that is long enough", truncate=3, max_tokens=3).usage.prompt_tokens == 3
    echoed = client.generate("Hello there", max_tokens=3, echo=True)
    assert echoed.text.startswith("Hello there")


def test_many_streams_share_one_connection(mock_address: str) -> None:
    async def main() -> list[Completion]:
        async with AsyncClient(mock_address) as client:
            prompts = [list(range(1 + index)) for index in range(300)]
            return await asyncio.gather(*(client.generate(prompt, max_tokens=40, ignore_eos=True) for prompt in prompts))

    completions = asyncio.run(main())
    assert all(len(completion.ids) == 40 for completion in completions)
    assert [len(completion.prompt_ids) for completion in completions] == list(range(1, 301))


BAD: dict[str, tuple[dict[str, Any], type[PenstockError], str]] = {
    "a temperature below 0": ({"prompt": "a", "temperature": -1}, InvalidRequest, "temperature"),
    "not a number": ({"prompt": "a", "top_p": float("nan")}, InvalidRequest, "top_p"),
    "the wrong type": ({"prompt": "a", "max_tokens": "5"}, InvalidRequest, "max_tokens"),
    "an unknown field": ({"prompt": "a", "temprature": 1}, InvalidRequest, "temprature"),
    "an empty prompt": ({"prompt": ""}, InvalidRequest, "prompt"),
    "no ids": ({"prompt": []}, InvalidRequest, "prompt"),
    "negative ids": ({"prompt": [1, -2]}, InvalidRequest, "prompt"),
    "ids that are not numbers": ({"prompt": [1, "a"]}, InvalidRequest, "prompt"),
    "huge ids": ({"prompt": [2**40]}, InvalidRequest, "prompt"),
    "bytes": ({"prompt": b"a"}, InvalidRequest, "prompt"),
    "half a character": ({"prompt": "\ud800"}, InvalidRequest, "request"),
    "a prompt and messages": ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, InvalidRequest, "prompt"),
    "messages without a role": ({"messages": [{"content": "a"}]}, InvalidRequest, "messages[0]"),
    "content that cannot travel": ({"messages": [{"role": "user", "content": object()}]}, InvalidRequest, "request"),
    "keys that are not text": ({"messages": [{"role": "user", "content": {1: 2}}]}, InvalidRequest, "request"),
    "parameters that are a map": ({"prompt": "a", "params": {"seed": 1}}, InvalidRequest, "params"),
    "a tenant that is no text": ({"prompt": "a", "tenant": 0}, InvalidRequest, "tenant"),
    "a deadline in the past": ({"prompt": "a", "deadline": -1}, InvalidRequest, "deadline"),
    "a long request id": ({"prompt": "a", "request": "x" * 300}, InvalidRequest, "request"),
    "a priority of 40 bits": ({"prompt": "a", "priority": 2**40}, InvalidRequest, "priority"),
    "a message that is too large": ({"prompt": "a" * 17_000_000}, MessageTooLarge, "request"),
    "too many list items": ({"messages": [{"role": "user", "content": ["x"] * 70_000}]}, MessageTooLarge, "request"),
    "an id outside the vocabulary": ({"prompt": [2_000_000_000]}, InvalidRequest, "ids"),
    "a prompt that is too long": ({"prompt": [1] * 200_000}, PromptTooLong, "prompt"),
    "an adapter that is not there": ({"prompt": "a", "adapter": "nobody"}, UnknownAdapter, "adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error_and_disturbs_nobody(client: Client, case: str) -> None:
    arguments, kind, field = BAD[case]
    neighbour = client.stream("neighbour", max_tokens=20, ignore_eos=True)
    arguments = dict(arguments)
    with pytest.raises(kind) as caught:  # noqa: PT012  one call, of two kinds
        if "messages" in arguments and "prompt" not in arguments:
            client.chat(arguments.pop("messages"), **arguments)
        else:
            client.generate(arguments.pop("prompt"), **arguments)
    assert caught.value.field == field
    assert caught.value.value is not None
    assert caught.value.limit or kind is UnknownAdapter
    assert len(neighbour.completion().ids) == 20


def test_the_same_request_id_twice_is_refused(client: Client) -> None:
    stream = client.stream("a", max_tokens=LONG, request="mine")
    with pytest.raises(InvalidRequest) as caught:
        client.stream("b", request="mine")
    assert (caught.value.code, caught.value.field) == ("duplicate_request", "request")
    stream.cancel()


def test_leaving_the_loop_frees_the_engine(client: Client) -> None:
    for _ in client.stream("a", max_tokens=LONG, ignore_eos=True):
        break
    until(lambda: client.requests() == [])
    until(lambda: client.status()["requests"]["open"] == 0)


def test_requests_are_listed_and_cancelled_by_id(client: Client) -> None:
    stream = client.stream("a", max_tokens=LONG, ignore_eos=True, request="mine")
    next(reader := iter(stream))
    (row,) = client.requests()
    assert row["request"] == "mine"
    assert row["prompt_tokens"] > 0
    client.cancel("mine", "no such request")
    assert [chunk.finish_reason for chunk in reader][-1] == "cancelled"


def test_a_deadline_ends_a_request_with_its_own_reason(client: Client) -> None:
    assert client.generate("a", max_tokens=30_000, ignore_eos=True, deadline=0.2).finish_reason in ("deadline", "length")


def test_status_tells_of_every_actor(client: Client) -> None:
    until(lambda: len(client.status()["actors"]) >= 5)
    report = client.status()
    assert report["state"] == "ready"
    assert {row["kind"] for row in report["actors"]} >= {"executor", "scheduler", "tokenizer", "detokenizer"}
    assert {"open", "total", "finished", "failed"} <= report["requests"].keys()


def test_a_saved_stream_is_carried_on_by_another_client(mock_address: str) -> None:
    with Client(mock_address) as client:
        whole = client.generate("Hello", max_tokens=200, ignore_eos=True, seed=1)
        stream = client.stream("Hello", max_tokens=200, ignore_eos=True, seed=1)
        next(iter(stream))
        saved = stream.save()
    with Client(mock_address) as client:
        resumed = client.resume(saved)
        assert resumed.completion().ids == whole.ids
        assert resumed.completion().text == whole.text
        with pytest.raises(InvalidRequest):
            client.resume({"version": 7})


def test_map_keeps_order_and_reports_failures_one_by_one(client: Client) -> None:
    prompts = [[index, index + 1] if index != 5 else [] for index in range(100)]
    outcomes = list(client.map(prompts, concurrency=16, max_tokens=5, ignore_eos=True))
    assert [outcome.index for outcome in outcomes] == list(range(100))
    assert [outcome.index for outcome in outcomes if outcome.error] == [5]
    assert all(len(outcome.unwrap().ids) == 5 for outcome in outcomes if outcome.index != 5)


def raw(address: str) -> zmq.Socket[bytes]:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.rcvtimeo = 5000
    dealer.connect(address)
    return dealer


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"garbage"], "malformed"),
        ([b""], "malformed"),
        ([TO_GATEWAY.encode(wire.Hello("c", "n"))[:-1]], "malformed"),
        ([b"\x94\x02\x01\xa1c\xa1n"], "version"),
        ([b"\x92\x01\x63"], "unknown_message"),
        ([b"\x93\x01\x03" + b"\x91" * 50 + b"\x90"], "too_deep"),
        ([b"\x93\x01\x03\xdd\x7f\xff\xff\xff"], "too_many_elements"),
        ([b"\x94\x01\x01\xa1c\xa1n", b"second"], "malformed"),
        ([b"\xc6\x01\x20\x00\x00" + bytes(0x1200000)], "too_large"),
    ],
)
def test_frames_that_are_no_messages_get_a_typed_answer(mock_address: str, client: Client, frames: list[bytes], code: str) -> None:
    dealer = raw(mock_address)
    dealer.send_multipart(frames)
    answer = TO_CLIENT.decode(dealer.recv())
    assert isinstance(answer, wire.Failed)
    assert (answer.request, answer.error["code"]) == (None, code)
    dealer.close()
    assert len(client.generate("a", max_tokens=3, ignore_eos=True).ids) == 3


def test_a_connection_that_did_not_say_hello_is_sent_away(mock_address: str) -> None:
    dealer = raw(mock_address)
    dealer.send(TO_GATEWAY.encode(wire.Renew(0)))
    assert TO_CLIENT.decode(dealer.recv()) == wire.Goodbye()
    dealer.close()


def test_a_client_that_vanishes_leaves_nothing_open(mock_address: str, client: Client) -> None:
    dealer = raw(mock_address)
    dealer.send(TO_GATEWAY.encode(wire.Hello("vanishing", "")))
    assert isinstance(TO_CLIENT.decode(dealer.recv()), wire.Welcome)
    order = wire.Generate("r", None, None, bytes(8), {"max_tokens": 30_000, "ignore_eos": True}, {}, None, 0, "", None, None, None, None)
    dealer.send(TO_GATEWAY.encode(order))
    assert isinstance(TO_CLIENT.decode(dealer.recv()), wire.Accepted)
    dealer.close()
    until(lambda: client.status()["requests"]["open"] == 0)


def test_an_event_loop_that_was_blocked_for_longer_than_the_lease_carries_on(mock_address: str) -> None:
    async def main() -> Completion:
        async with AsyncClient(mock_address) as client:
            stream = client.stream("Hello", max_tokens=5000, ignore_eos=True, seed=1)
            time.sleep(4.0)  # the lease is 3 s
            return await stream.completion()

    with Client(mock_address) as client:
        assert asyncio.run(main()).ids == client.generate("Hello", max_tokens=5000, ignore_eos=True, seed=1).ids


# Starting and ending engines.


def processes(marker: str) -> list[int]:
    """Processes whose command line or environment has the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model": "/no/such/folder"}, StartError),
        ({"nonsense": 1}, InvalidRequest),
        ({"lookahead": 7}, InvalidRequest),
        ({"executor": "mock", "address": "ipc:///no/such/folder/door"}, StartError),
    ],
)
def test_an_engine_that_cannot_start_raises_its_own_error(config: dict[str, Any], kind: type[PenstockError]) -> None:
    with pytest.raises(kind), launch(**config):
        pass


def test_a_model_that_is_broken_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError), launch(str(tmp_path)):
        pass


def test_an_address_in_use_is_said(mock_address: str) -> None:
    with pytest.raises(StartError) as caught, launch(executor="mock", address=mock_address):
        pass
    assert "listen" in caught.value.message


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(StartError) as caught, launch(executor="mock", address=address):
            pass
    assert (caught.value.field, caught.value.value) == ("address", address)


def test_launch_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    async def main() -> None:
        async with alaunch(executor="mock", directory=str(tmp_path / "engine")) as client:
            await client.generate([1, 2], max_tokens=5)
            assert list((tmp_path / "engine").iterdir())

    asyncio.run(main())
    assert not (tmp_path / "engine").exists()


LAUNCHER = """
import sys, time
from penstock.clients import launch
with launch(executor="mock", directory=sys.argv[1]) as client:
    print(client.generate([1, 2], max_tokens=3).ids, flush=True)
    time.sleep(60)
"""


def test_the_engine_ends_with_the_process_that_launched_it(tmp_path: Path) -> None:
    marker = f"PENSTOCK_TEST_MARK={tmp_path}"
    child = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path / "engine")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PENSTOCK_TEST_MARK": str(tmp_path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith(b"[")
    assert len(processes(marker)) >= 5
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    until(lambda: processes(marker) == [])
    until(lambda: not (tmp_path / "engine").exists())


def test_streams_survive_the_death_of_any_actor() -> None:
    with Engine(executor="mock", lease=3.0) as engine:
        engine.wait(120)
        with Client(engine.address) as client:
            whole = {index: client.generate([index, 7], max_tokens=3000, ignore_eos=True, seed=1).ids for index in range(4)}
            until(lambda: len(client.status()["actors"]) >= 5)
            for kind in ("gateway", "scheduler", "executor", "detokenizer"):
                pids = [row["pid"] for row in client.status()["actors"] if row["kind"] == kind]
                streams = {index: client.stream([index, 7], max_tokens=3000, ignore_eos=True, seed=1) for index in whole}
                time.sleep(0.02)
                os.kill(pids[0], signal.SIGKILL)
                assert {index: stream.completion().ids for index, stream in streams.items()} == whole, kind
                until(lambda pids=pids, kind=kind: any(  # type: ignore[misc]
                    row["kind"] == kind and row["pid"] not in pids and row["state"] == "ready" for row in client.status()["actors"]
                ))  # fmt: skip


def test_an_engine_that_is_gone_for_good_fails_its_requests() -> None:
    with Engine(executor="mock") as engine:
        engine.wait(120)
        with Client(engine.address, patience=1.0) as client:
            stream = client.stream("a", max_tokens=30_000, ignore_eos=True)
            threading.Timer(0.05, engine.stop).start()
            with pytest.raises(ConnectionLost):
                stream.completion()
            saved = stream.save()
    with launch(executor="mock") as client:
        assert client.resume(saved).completion().finish_reason == "length"


def test_another_model_refuses_to_carry_on(mock_address: str, tiny_address: str) -> None:
    with Client(mock_address) as client:
        stream = client.stream("Hello", max_tokens=LONG)
        next(iter(stream))
        saved = stream.save()
    with Client(tiny_address) as client, pytest.raises(DigestMismatch):
        client.resume(saved).completion()


def test_the_shipped_model_is_served(tiny_address: str) -> None:
    with Client(tiny_address) as client:
        greedy = client.generate("The for statement", max_tokens=8, temperature=0, logprobs=2, prompt_logprobs=1)
        assert greedy.text.strip()
        assert greedy.logprobs is not None
        assert [one.id for one in greedy.logprobs] == greedy.ids
        assert all(one.rank == 1 and len(one.top) == 2 for one in greedy.logprobs)
        assert greedy.prompt_logprobs is not None
        samples = client.generate("The", max_tokens=4, n=2, seed=4, temperature=1.0).samples
        assert len(samples) == 2
