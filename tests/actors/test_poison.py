"""A request that kills the executor ends by its own fault, and all others go on: over a whole engine, whose executor dies of one token."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.actors import executor as executor_module
from penstock.actors.config import EngineConfig
from penstock.actors.supervisor import Supervisor
from penstock.clients.errors import PenstockError
from penstock.clients.sync import Client
from penstock.engine.mock import MockPending, MockRunner
from penstock.engine.plan import StepPlan, StepResult

POISON, ROOM = 666, 3000


class Poisoned(MockRunner):
    """Dies of a step in which a prompt has the token `POISON`, and has no memory for one of more than `ROOM` tokens."""

    def launch(self, plan: StepPlan) -> MockPending:
        if POISON in np.asarray(plan.tokens):
            raise RuntimeError("poisoned")
        if int(plan.counts.sum()) > ROOM:
            return MockPending(StepResult(plan.step, np.empty(0, np.int32), error="OutOfMemoryError: there is no more"))
        return super().launch(plan)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """Of an engine in this process, so that its executor can be given another runner."""
    honest = executor_module.open_mock

    def open_poisoned(**options: Any) -> tuple[MockRunner, dict[str, Any]]:
        runner, facts = honest(**options)
        return Poisoned(facts["vocab_size"], runner.first, runner.span), facts

    monkeypatch.setattr(executor_module, "open_mock", open_poisoned)
    reports: list[dict[str, Any]] = []
    ready = threading.Event()

    def report(news: dict[str, Any]) -> None:
        reports.append(news)
        ready.set()

    log = str(tmp_path / "log.jsonl")
    supervisor = Supervisor(EngineConfig(executor="mock", placement="threads", log_file=log), report)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    assert ready.wait(30)
    with Client(reports[0]["ready"]) as connected:
        yield connected
    supervisor.stopping = "the test is over"
    thread.join(30)
    assert not thread.is_alive()


def test_the_guilty_request_is_quarantined_and_the_others_go_on(client: Client) -> None:
    alone = client.generate([5, 6, 7], max_tokens=2000)
    streams = [client.stream([5, 6, 7], max_tokens=2000) for _ in range(6)]
    guilty = [client.stream([1, POISON, place], max_tokens=10) for place in range(2)]
    late = [client.stream([5, 6, 7], max_tokens=50) for _ in range(3)]
    for stream in guilty:
        with pytest.raises(PenstockError, match="only one there") as fault:
            stream.completion()
        assert (fault.value.code, fault.value.retryable, fault.value.actor) == ("engine_fault", False, "executor")
    assert all(stream.completion().ids == alone.ids for stream in streams)
    assert all(stream.completion().ids == alone.ids[:50] for stream in late)
    assert client.generate([5, 6, 7], max_tokens=10).ids == alone.ids[:10]
    assert client.status()["requests"]["open"] == 0


def test_a_step_without_memory_makes_later_ones_smaller(client: Client) -> None:
    long = client.generate([5] * 5000, max_tokens=100)
    assert len(long.ids) == 100
    end = time.monotonic() + 20
    while not any(row["kind"] == "executor" and row["incarnation"] > 5 for row in client.status()["actors"]):
        assert time.monotonic() < end, "no step ran out of memory"
        time.sleep(0.1)
    assert client.generate([5] * 5000, max_tokens=100).ids == long.ids
