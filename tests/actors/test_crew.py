"""What the supervisor makes of a death, and of a machine that stood still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.actors import crew as crew_module
from penstock.actors.actor import PeerKey, Post
from penstock.actors.config import EngineConfig
from penstock.actors.crew import Crew
from penstock.actors.log import open_log
from penstock.actors.mailbox import Mailbox
from penstock.actors.worker import Worker
from penstock.actors.workplace import Workplace


class Killed(Worker):
    """Ready, and then gone by a SIGKILL that was not ours."""

    def __init__(self, kind: str) -> None:
        super().__init__(Post(kind, 0, 1, "inproc://a", "inproc://s", "/tmp", EngineConfig()))
        self.begin({"token_budget": 512} if kind == "executor" else {}, 100.0)

    def gone(self) -> bool:
        return True

    def killed(self) -> bool:
        return True

    def death(self) -> str:
        return "killed by SIGKILL"


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """One that hires nobody: what it would have hired is in `hired`."""
    context: zmq.Context[Any] = zmq.Context()
    mail = Mailbox(context, "inproc://supervisor")
    workplace = Workplace(str(tmp_path / "place"))
    log = open_log("error", str(tmp_path / "log"))
    made = Crew(EngineConfig(executor="mock"), context, workplace, mail, "inproc://supervisor", "d", log)
    made.started = True
    monkeypatch.setattr(made, "_hire", lambda key: made.workers.pop(key))
    yield made
    mail.close()
    workplace.close()
    context.destroy(linger=0)


def bury(crew: Crew, key: PeerKey, starved: list[int], monkeypatch: pytest.MonkeyPatch) -> Worker:
    """`starved`: how many processes the kernel had killed for want of memory at each look."""
    counts = iter(starved)
    monkeypatch.setattr(crew_module, "starved_processes", lambda: next(counts, starved[-1]))
    worker = Killed(key[0])
    crew.look(100.0)
    crew.workers[key] = worker
    crew.look(101.0)
    return worker


@pytest.mark.parametrize("kind", ["executor", "scheduler", "gateway", "tokenizer", "detokenizer"])
def test_a_kill_from_outside_is_nobodys_fault_however_often_memory_ran_out_before(
    kind: str, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bury(crew, (kind, 0), [7], monkeypatch)
    assert worker.blameless
    assert crew.failure is None
    assert crew._token_budget is None


@pytest.mark.parametrize(("kind", "blameless", "budget"), [("executor", False, 256), ("gateway", True, None)])
def test_a_kill_for_want_of_memory_makes_the_steps_smaller_if_it_was_the_executors(
    kind: str, blameless: bool, budget: int | None, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bury(crew, (kind, 0), [7, 8], monkeypatch)
    assert worker.blameless is blameless
    assert crew._token_budget == budget
    assert crew.failure is None


def test_a_pause_of_the_whole_machine_makes_nobody_a_laggard(crew: Crew) -> None:
    worker = Killed("executor")
    crew.workers["executor", 0] = worker
    crew.forgive(60.0)
    assert worker.stalled(165.0, 10.0) is None
    assert worker.stalled(171.0, 10.0) == 11.0
