"""What the supervisor makes of a death, and of a machine that stood still."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from penstock.actors import crew as crew_module
from penstock.actors.actor import PeerKey, Post
from penstock.actors.config import EngineConfig
from penstock.actors.crew import Crew
from penstock.actors.log import open_log
from penstock.actors.mailbox import Mailbox
from penstock.actors.messages import Up
from penstock.actors.supervisor import PR_SET_CHILD_SUBREAPER
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
def hiring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """A crew as the supervisor has it, which has hired nobody yet."""
    folder = tmp_path_factory.mktemp("e")  # a socket's path is short
    context: zmq.Context[Any] = zmq.Context()
    workplace = Workplace(str(folder / "place"))
    address = workplace.address("ipc://", "supervisor")
    mail = Mailbox(context, address)
    log = open_log("error", str(folder / "log"))
    yield Crew(EngineConfig(executor="mock", log_file=str(folder / "log")), context, workplace, mail, address, f"ipc://{folder}/door", log)
    mail.close()
    workplace.close()
    context.destroy(linger=0)


@pytest.fixture
def crew(hiring: Crew, monkeypatch: pytest.MonkeyPatch) -> Crew:
    """One that has started, and hires nobody from now on."""
    hiring.started = True
    monkeypatch.setattr(hiring, "_hire", lambda key: hiring.workers.pop(key))
    return hiring


@pytest.fixture
def adopting() -> Iterator[None]:
    """Orphans of this process's descendants become its children, as they become the supervisor's."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


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


@pytest.mark.usefixtures("adopting")
def test_an_actor_that_is_heard_of_before_the_fork_server_tells_of_it_is_known_by_its_own_word(hiring: Crew) -> None:
    """Both write at about the same time, through two sockets."""
    hiring._open_forks()
    key = "detokenizer", 0
    hiring._hire(key)
    worker = hiring.workers[key]
    try:
        while not isinstance(up := hiring.mail.receive(), Up):
            hiring.mail.wait(1.0)
        assert hiring.sender(up) is worker
        assert worker.pid == 0  # nobody has listened to the fork server
        hiring.listens(worker, up.address, up.pid)
        hiring.begin(worker, {}, time.monotonic())
        ((kind, index, _, state, pid, *_),) = hiring.vitals(time.monotonic())
        assert (kind, index, state, pid) == (*key, "ready", up.pid)
        descriptor = worker.pidfd
        assert hiring._forks is not None
        while hiring._forks.control.fileno() not in hiring.mail.wait(1.0):
            pass
        hiring.look(time.monotonic())  # now the fork server is heard
        assert (worker.pid, worker.pidfd) == (up.pid, descriptor)
        worker.kill()
        while descriptor not in hiring.mail.wait(1.0):
            pass
        assert worker.gone()
        assert worker.killed()
    finally:
        hiring.dismiss()
