"""Time goes on for a request wherever it is, also where the part that has it does not move; and it ends with its own reason."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from penstock.clients import Client
from penstock.clients.launcher import Engine

SOON = 8.0  # seconds; a part that does not move is only replaced after 30, and 20,000 tokens take minutes


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("tiny", executor="mock", mock_step=0.01, max_running=1, stall_timeout=30.0) as running:
        running.wait(60)
        yield running


@contextmanager
def frozen(client: Client, kind: str) -> Iterator[None]:
    (pid,) = (row["pid"] for row in client.status()["actors"] if row["kind"] == kind)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ended(client: Client, *prompts: Any, **params: Any) -> tuple[list[str | None], float]:
    """Reasons of requests that are begun one after another, and the seconds until the last one has ended."""
    begun = time.monotonic()
    streams = [client.stream(prompt, max_tokens=20_000, ignore_eos=True, **params) for prompt in prompts]
    return [stream.completion().samples[0].finish_reason for stream in streams], time.monotonic() - begun


@pytest.mark.parametrize("reason", ["deadline", "queue_timeout"])
def test_a_request_that_waits_in_the_queue_ends_in_time(engine: Engine, reason: str) -> None:
    with Client(engine.address) as client, client.stream([1], max_tokens=20_000, ignore_eos=True) as first:
        reader = iter(first)
        next(reader)
        reasons, seconds = ended(client, [1], **{reason: 0.3})
        assert reasons == [reason]
        assert seconds < SOON


@pytest.mark.parametrize("reason", ["deadline", "queue_timeout"])
def test_a_request_that_is_being_tokenized_ends_with_the_same_reason(engine: Engine, reason: str) -> None:
    with Client(engine.address) as client, frozen(client, "tokenizer"):
        reasons, seconds = ended(client, "text", **{reason: 0.3})
        assert reasons == [reason]
        assert seconds < SOON


@pytest.mark.parametrize("kind", ["executor", "scheduler", "detokenizer"])
def test_a_deadline_is_kept_while_a_part_does_not_move(engine: Engine, kind: str) -> None:
    with Client(engine.address) as client, frozen(client, kind):
        reasons, seconds = ended(client, [1], [2], deadline=0.3)
        assert reasons == ["deadline", "deadline"]
        assert seconds < SOON
    with Client(engine.address) as client:
        assert len(client.generate([1], max_tokens=3, ignore_eos=True).ids) == 3


def test_the_wire_names_the_reason_of_what_was_never_accepted(engine: Engine, connect: Callable[..., Any]) -> None:
    raw = connect(engine.address)
    raw.hello()
    with Client(engine.address) as client, frozen(client, "tokenizer"):
        raw.generate("r", prompt="text", deadline=0.2)
        error = raw.failure("r")
    assert (error["code"], error["retryable"]) == ("deadline", True)
