"""An engine writes down what its scheduler did, when it is asked to and when it crashes; anybody can run it again."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import pytest
import zmq

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.actors.messages import INSIDE, StepDone
from penstock.actors.recordings import KEPT, keep, recordings_folder
from penstock.clients import Client, Engine
from penstock.engine.recording import COLUMNS

SECRET = [4711, 4242, 4343, 4999] * 12


def run_replay(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock.clients.cli.main", "replay", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1", "TERM": "dumb"})


def wait_for_recording(folder: Path, seconds: float = 20.0) -> Path:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := list(folder.glob("*.recording")):
            return found[0]
        time.sleep(0.02)
    raise TimeoutError(f"no recording in {folder}")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for sockets, whose path is short enough."""
    path = Path("/tmp") / f"pr{os.getpid()}{time.monotonic_ns() % 10**6}"
    path.mkdir(mode=0o700)
    yield path
    path.rmdir()


def test_an_engine_that_runs_can_be_asked_for_a_recording(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    with Engine("tiny", executor="mock", record_folder=str(folder), log_file=str(tmp_path / "log"), lookahead=2, blocks=64) as engine:
        engine.wait(60)
        with Client(engine.address) as client, ThreadPoolExecutor(6) as pool:
            for _ in range(2):
                list(pool.map(lambda n: client.generate([*SECRET, n], max_tokens=100 + n, seed=n), range(6)))
            engine.record()
            path = wait_for_recording(folder)
            assert client.generate([1, 2], max_tokens=3, ignore_eos=True).ids
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    data = path.read_bytes()
    assert not any(token.to_bytes(4, order) in data for token in SECRET for order in ("little", "big"))
    assert msgpack.packb(SECRET)[3:] not in data
    done = run_replay(path)
    assert done.returncode == 0, done.stderr
    steps, calls = (int(word) for word in done.stdout.split() if word.isdecimal())
    assert calls > steps > 200
    assert done.stdout.endswith("every plan is the recorded one, ids aside\n")
    assert str(path) in (tmp_path / "log").read_text()

    body = msgpack.unpackb(data)
    plan = next(call for call in body[5] if call[0] == "plan" and call[4] is not None and call[4][COLUMNS.index("step")] == 40)
    plan[4][COLUMNS.index("starts")] = plan[4][COLUMNS.index("starts")][::-1]
    path.write_bytes(msgpack.packb(body))
    done = run_replay(path)
    assert done.returncode == 1
    assert "step 40 has other `starts`: recorded [" in done.stderr
    path.write_bytes(data[:1000])
    done = run_replay(path)
    assert done.returncode == 2
    assert "cut short" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_scheduler_that_crashes_leaves_a_recording_of_it(tmp_path: Path, short: Path) -> None:
    with Engine("tiny", executor="mock", log_file=str(tmp_path / "log"), directory=str(short)) as engine:
        engine.wait(60)
        with Client(engine.address) as client:
            stream = client.stream([5, 6, 7], max_tokens=6000, ignore_eos=True)
            reading = iter(stream)  # dropping it would cancel the request
            assert next(reading).ids
            incarnations = {row["kind"]: row["incarnation"] for row in client.status()["actors"]}
            # The results of a step that was never planned: whatever sends these has lost its mind, and so must the scheduler.
            wrong = StepDone(incarnations["scheduler"], incarnations["executor"], 10**6, b"", None, None, None, 0.0)
            with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
                socket.connect(f"ipc://{next(short.glob('*/scheduler0.*'))}")
                socket.send(INSIDE.encode(wrong))
                path = wait_for_recording(tmp_path)
            assert len(stream.completion().ids) == 6000  # and streams survive
    done = run_replay(path)
    assert done.returncode == 0, done.stderr
    assert "the scheduler raised, as it did when it was recorded: ValueError: step 1000000" in done.stdout


def test_only_the_newest_recordings_are_kept(tmp_path: Path) -> None:
    (tmp_path / "else").write_text("not ours")
    for number in range(KEPT + 3):
        path = keep(tmp_path, str(number).encode())
        os.utime(path, (number, number))
    assert sorted(int(path.read_bytes()) for path in tmp_path.glob("*.recording")) == list(range(3, KEPT + 3))
    assert (tmp_path / "else").exists()


def test_drafts_of_recordings_that_were_cut_off_are_removed(tmp_path: Path) -> None:
    name = keep(tmp_path, b"1").stem
    cut_off, being_written = tmp_path / f"{name[:-6]}aaaaaa.new", tmp_path / f"{name[:-6]}bbbbbb.new"
    others = [tmp_path / "scheduler-notes.new", tmp_path / f"{name}.new.old", tmp_path / "scheduler-1.recording"]
    linked, directory = tmp_path / f"{name[:-6]}cccccc.new", tmp_path / f"{name[:-6]}dddddd.new"
    for path in (cut_off, being_written, *others):
        path.write_text("x")
    linked.symlink_to(others[0])
    directory.mkdir()
    for path in (cut_off, directory, *others):
        os.utime(path, (1, 1))
    keep(tmp_path, b"2")
    assert not cut_off.exists()
    assert all(path.exists() for path in (being_written, linked, directory, *others))
    assert len(list(tmp_path.glob("*.recording"))) == 3


def test_a_file_that_another_engine_removed_stops_no_tidying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(KEPT):
        os.utime(keep(tmp_path, b""), (number, number))
    oldest, lstat = min(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime), Path.lstat

    def gone(path: Path) -> os.stat_result:
        if path == oldest:
            path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", gone)
    keep(tmp_path, b"")
    assert len(list(tmp_path.iterdir())) == KEPT


def test_where_recordings_go() -> None:
    assert recordings_folder(EngineConfig(record_folder="/a", log_file="/b/log")) == Path("/a")
    assert recordings_folder(EngineConfig(log_file="/b/log")) == Path("/b")
    assert recordings_folder(EngineConfig()).name == "recordings"
    with pytest.raises(Refusal, match="record_ring=-1"):
        EngineConfig(record_ring=-1)
