"""Starting, stopping and dying: nothing is left behind, whoever ends first, and streams go on when a part of the engine does not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from penstock.actors.mailbox import open_outbox
from penstock.actors.messages import INSIDE, Died
from penstock.actors.protocol import Accepted, Chunks, Renew
from penstock.clients.errors import InvalidRequest, PenstockError, StartError
from penstock.clients.launcher import Engine

PROCESSES = 7  # supervisor, fork server and five actors


def family(pid: int) -> list[psutil.Process]:
    supervisor = psutil.Process(pid)
    return [supervisor, *supervisor.children(recursive=True)]


def wait_gone(processes: list[psutil.Process], seconds: float = 20.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for an engine's sockets, whose path is short enough."""
    path = Path("/tmp") / f"ps{os.getpid()}{time.monotonic_ns() % 10**6}"
    path.mkdir(mode=0o700)
    (path / "mine").write_text("not the engine's")
    yield path
    assert (path / "mine").exists()
    shutil.rmtree(path)


def test_terminating_drains_and_leaves_nothing_behind(private: Path, connect: Callable[[str], Any]) -> None:
    before = shared_memory()
    with Engine("tiny", executor="mock", directory=str(private)) as engine:
        engine.wait(60)
        processes = family(engine.pid)
        assert len(processes) == PROCESSES
        raw = connect(engine.address)
        raw.hello()
        raw.generate("r", ids=array("i", [1, 2]).tobytes(), params={"max_tokens": 3000})
        raw.wait(Accepted)
        engine.drain()
        time.sleep(0.05)
        raw.generate("late", ids=array("i", [1, 2]).tobytes())
        assert raw.failure("late")["code"] == "draining"
        assert raw.done("r")["generated_tokens"] == 3000
        wait_gone(processes)
        assert engine.status == 0
    assert [entry.name for entry in private.iterdir()] == ["mine"]
    assert shared_memory() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(number: signal.Signals, connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", drain_timeout=100.0) as engine:
        engine.wait(60)
        processes = family(engine.pid)
        raw = connect(engine.address)
        raw.hello()
        raw.credit = False  # what is open will not finish
        raw.generate("r", ids=array("i", [1, 2]).tobytes(), params={"max_tokens": 30_000, "n": 100})
        raw.wait(Accepted)
        os.kill(engine.pid, number)
        time.sleep(0.3)
        os.kill(engine.pid, number)
        wait_gone(processes)


def test_every_actor_dies_with_a_supervisor_that_is_killed(private: Path) -> None:
    with Engine("tiny", executor="mock", directory=str(private)) as engine:
        engine.wait(60)
        processes = family(engine.pid)
        os.kill(engine.pid, signal.SIGKILL)
        wait_gone(processes)


def test_the_engine_dies_with_the_process_that_launched_it() -> None:
    program = (
        "import time\nfrom penstock.clients.launcher import Engine\n"
        "engine = Engine('tiny', executor='mock')\nengine.wait(60)\nprint(engine.pid, flush=True)\ntime.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        processes = family(int(launcher.stdout.readline()))
        assert len(processes) == PROCESSES
        launcher.kill()
    wait_gone(processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("kind", ["executor", "scheduler", "tokenizer", "detokenizer", "gateway"])
def test_streams_survive_the_death_of_any_actor_and_one_that_freezes(kind: str, number: signal.Signals, tmp_path: Path) -> None:
    from penstock.clients.sync import Client

    log = tmp_path / "log.jsonl"
    with Engine("tiny", executor="mock", stall_timeout=3.0, log_file=str(log)) as engine:
        engine.wait(60)
        with Client(engine.address) as client:
            whole = client.generate([5, 6, 7], max_tokens=8000, temperature=1.0, seed=1, n=8)
            assert len({tuple(sample.ids) for sample in whole.samples}) == 8
            stream = client.stream([5, 6, 7], max_tokens=8000, temperature=1.0, seed=1, n=8)
            reading = iter(stream)  # dropping it would cancel the request
            assert next(reading).ids
            victim = next(row["pid"] for row in client.status()["actors"] if row["kind"] == kind)
            os.kill(victim, number)
            completion = stream.completion()
            for sample, undisturbed in zip(completion.samples, whole.samples, strict=True):
                assert len(sample.ids) == 8000
                assert sample.ids == undisturbed.ids
                assert sample.text == undisturbed.text
            while max(row["incarnation"] for row in client.status()["actors"]) <= 5:
                time.sleep(0.1)  # streams may not have needed it
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["kind"] for line in lines if line["event"] == "stalled"] == [kind] * (number == signal.SIGSTOP)


def test_an_actor_that_says_it_cannot_go_on_and_does_not_end_is_replaced(private: Path, connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", stall_timeout=3.0, directory=str(private)) as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        row = next(row for row in raw.until(lambda report: bool(report["actors"]))["actors"] if row["kind"] == "tokenizer")
        context: zmq.Context[Any] = zmq.Context()
        (address,) = private.glob("*/supervisor.*")
        outbox = open_outbox(context, f"ipc://{address}")
        fault = {"code": "engine_fault", "message": "it is said for it, which goes on"}
        outbox.send(INSIDE.encode(Died("tokenizer", row["index"], row["incarnation"], fault)))
        raw.until(lambda report: any(one["incarnation"] > row["incarnation"] + 4 and one["state"] == "ready" for one in report["actors"]))
        raw.generate("r", prompt="hello there", params={"max_tokens": 5})
        assert raw.done("r")["generated_tokens"] == 5
        context.destroy(linger=0)


def test_draining_waits_for_a_slow_reader(connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", window=1) as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        raw.credit = False
        raw.generate("r", ids=array("i", [1, 2]).tobytes(), params={"max_tokens": 500})
        raw.wait(Chunks)
        engine.drain()
        time.sleep(1.0)
        raw.credit = True
        raw.send(Renew(1))
        assert raw.done("r")["generated_tokens"] == 500


@pytest.mark.parametrize("stopped", ["executor", "tokenizer"])
def test_a_deadline_passes_also_while_a_part_of_the_engine_hangs(stopped: str, connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock") as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        actors = raw.until(lambda report: len(report["actors"]) == 5)["actors"]
        os.kill(next(row["pid"] for row in actors if row["kind"] == stopped), signal.SIGSTOP)
        raw.generate("r", prompt="hello there", params={"max_tokens": 5000}, deadline=0.5)
        if stopped == "tokenizer":
            assert raw.failure("r")["code"] == "deadline"
        else:
            assert [row[1] for row in raw.wait(Chunks, lambda message: bool(message.ends)).ends] == ["deadline"]


def test_all_actors_run_in_one_process_over_inproc(connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", placement="threads") as engine:
        engine.wait(60)
        assert len(family(engine.pid)) == 1
        raw = connect(engine.address)
        raw.hello()
        raw.generate("r", prompt="hello there", params={"max_tokens": 50})
        assert raw.done("r")["generated_tokens"] == 50
        assert any(isinstance(message, Chunks) for message in raw.got)


def test_several_tokenizers_and_detokenizers_share_the_work(connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", tokenizers=2, detokenizers=3) as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        for number in range(12):
            raw.generate(f"r{number}", prompt=f"hello {number}", params={"max_tokens": 40})
        ends: dict[str, int] = {}
        while len(ends) < 12:
            for name, usage in raw.wait(Chunks, lambda message: bool(message.done)).done:
                ends[name] = usage["generated_tokens"]
        assert set(ends.values()) == {40}
        # Reports are a second old at most: soon each has been seen to work.
        raw.until(lambda report: sum(row["progress"] > 1 for row in report["actors"] if row["kind"] in ("tokenizer", "detokenizer")) == 5)


@pytest.mark.parametrize(
    ("config", "kind", "field"),
    [
        ({"model": "/nowhere/at/all"}, PenstockError, None),
        ({"model": "tiny", "lookahead": 7}, InvalidRequest, "lookahead"),
        ({"model": "tiny", "colour": 7}, InvalidRequest, "colour"),
        ({"model": "tiny", "address": "tcp://0.0.0.0:5555"}, InvalidRequest, "address"),
        ({"model": "tiny", "executor": "mock", "directory": "/tmp/" + "long" * 30}, StartError, "directory"),
        ({"model": "tiny", "executor": "mock", "tokenizer": "/nowhere/at/all"}, PenstockError, "tokenizer"),
    ],
)
def test_an_engine_that_cannot_start_says_why(config: dict[str, Any], kind: type[PenstockError], field: str | None) -> None:
    with pytest.raises(kind) as caught, Engine(**config) as engine:
        engine.wait(60)
    if field is not None:
        assert getattr(caught.value, "field", None) == field


def test_a_port_in_use_is_a_typed_error_with_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StartError, match="cannot listen"), Engine("tiny", executor="mock", address=address) as engine:
            engine.wait(60)


def test_the_path_of_a_living_engine_is_not_taken_away(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/door"
    with Engine("tiny", executor="mock", address=address) as engine:
        engine.wait(60)
        with pytest.raises(StartError, match="already"), Engine("tiny", executor="mock", address=address) as second:
            second.wait(60)


def test_the_folder_of_an_engine_that_was_killed_is_removed_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    root = Path(f"/tmp/penstock-{os.getuid()}")
    with Engine("tiny", executor="mock") as engine:
        engine.wait(60)
        folder = Path(engine.address.removeprefix("ipc://")).parent
        processes = family(engine.pid)
        for process in reversed(processes):
            process.kill()
        wait_gone(processes)
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "lock").touch()
    with Engine("tiny", executor="mock") as engine:
        engine.wait(60)
        assert folder not in set(root.iterdir())


def test_logs_are_json_lines_that_name_their_actor(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Engine("tiny", executor="mock", log_file=str(log), log_level="info") as engine:
        engine.wait(60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"supervisor", "gateway", "scheduler", "executor", "tokenizer", "detokenizer"} <= {line["actor"] for line in lines}
    assert all(line["event"] and line["level"] and line["timestamp"] for line in lines)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_comes_back_although_the_fork_server_was_killed_too_or_froze(number: signal.Signals) -> None:
    from penstock.clients.sync import Client

    with Engine("tiny", executor="mock", stall_timeout=3.0) as engine:
        engine.wait(60)
        with Client(engine.address) as client:
            actors = {row["kind"]: row["pid"] for row in client.status()["actors"]}
            (forks,) = {process.pid for process in family(engine.pid)} - {*actors.values(), engine.pid}
            whole = client.generate([5, 6, 7], max_tokens=8000)
            stream = client.stream([5, 6, 7], max_tokens=8000)
            reading = iter(stream)  # dropping it would cancel the request
            assert next(reading).ids
            os.kill(forks, number)
            os.kill(actors["executor"], signal.SIGKILL)
            assert stream.completion().ids == whole.ids


def executor(report: dict[str, Any]) -> int:
    """Its process id."""
    return next((int(row["pid"]) for row in report["actors"] if row["kind"] == "executor"), 0)


def test_whoever_kills_the_executor_again_and_again_makes_nobody_guilty(connect: Callable[[str], Any]) -> None:
    with Engine("tiny", executor="mock", mock_step=0.05, token_budget=64, record_ring=0) as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        raw.generate("long", ids=array("i", range(2, 1002)).tobytes(), params={"max_tokens": 5})
        killed: set[int] = set()
        for _ in range(4):
            report = raw.until(lambda report: report["scheduler"].get("running") == 1 and executor(report) not in killed)
            killed.add(executor(report))
            os.kill(executor(report), signal.SIGKILL)
        assert raw.done("long")["generated_tokens"] == 5
