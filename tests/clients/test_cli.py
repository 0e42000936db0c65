"""The command line, as a user and as a program sees it."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.clients import Client
from penstock.clients.address import announce, default_address, engines_folder, running_engines
from penstock.clients.errors import ConnectionLost, InvalidRequest, OutputError
from penstock.clients.jsonl import Output, read_rows, result_row
from penstock.clients.values import Completion, Outcome, Sample, Usage

COMMAND = [sys.executable, "-m", "penstock.clients.cli.main"]
PLAIN = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}


def penstock(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], **{"capture_output": True, "text": True, "timeout": 120, "env": PLAIN, **more})


def test_help_names_every_command_and_every_parameter() -> None:
    shown = penstock("--help").stdout
    for name in ("serve", "generate", "chat", "status", "drain", "restart", "replay", "demo"):
        assert name in shown
    shown = penstock("generate", "--help").stdout
    for name in ("--temperature", "--stop-token-ids", "--ignore-eos", "--template-kwargs", "--input", "--as-completed"):
        assert name in shown
    assert "--lookahead" in penstock("serve", "--help").stdout


def test_generate_prints_the_text(mock_address: str) -> None:
    done = penstock("generate", "Hello", "--address", mock_address, "--max-tokens", "5", "--ignore-eos")
    with Client(mock_address) as client:
        assert done.stdout == client.generate("Hello", max_tokens=5, ignore_eos=True).text + "\n"
    assert done.returncode == 0


def test_errors_are_one_line_and_an_exit_status(mock_address: str, tmp_path: Path) -> None:
    bad = penstock("generate", "Hello", "--address", mock_address, "--temperature", "-3")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "temperature=-3.0: must be a finite number from 0 to 100" in bad.stderr
    assert "Traceback" not in bad.stderr
    nobody = penstock("generate", "Hello", "--address", f"ipc://{tmp_path}/nobody", "--timeout", "0.3")
    assert nobody.returncode == 75
    assert "no engine answers" in nobody.stderr
    assert penstock("generate", "--address", mock_address).returncode == 2


def test_status_is_for_people_and_for_programs(mock_address: str) -> None:
    assert "executor 0" in penstock("status", "--address", mock_address).stdout
    assert json.loads(penstock("status", "--json", "--address", mock_address).stdout)["state"] == "ready"


def test_chat_takes_turns_from_standard_input(mock_address: str) -> None:
    done = penstock("chat", "--address", mock_address, "--max-tokens", "4", "--ignore-eos", input="Hi\n\n/reset\nAgain\n/exit\n")
    assert done.returncode == 0
    assert done.stdout.count("\n") >= 2


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows: list[Any] = ["text", {"prompt": "map", "id": "second", "max_tokens": 2}, {"messages": [{"role": "user", "content": "hi"}]}]
    rows += [{"ids": [1, 2, 3]}, {"prompt": "bad", "temperature": -1}, [1, 2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\nnot json\n", encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("order", ["--in-order", "--as-completed"])
def test_a_file_of_prompts_becomes_a_file_of_results(mock_address: str, prompts: Path, tmp_path: Path, order: str) -> None:
    output = tmp_path / "results.jsonl"
    more = ("--address", mock_address, "--output", str(output), "--max-tokens", "5", "--ignore-eos", "--token-ids", order)
    done = penstock("generate", "--input", str(prompts), *more)
    assert done.returncode == 1, done.stderr
    assert "7 prompts done, 3 of them failed" in done.stderr
    rows = {row["id"]: row for row in read(output)}
    assert rows.keys() == {1, "second", 3, 4, 5, 6, 8}
    assert (len(rows[1]["ids"]), len(rows["second"]["ids"])) == (5, 2)
    assert rows[5]["error"]["field"] == "temperature"
    assert {rows[id]["error"]["code"] for id in (5, 6, 8)} == {"invalid_request"}
    if order == "--in-order":
        assert [row["id"] for row in read(output)] == [1, "second", 3, 4, 5, 6, 8]
    again = penstock("generate", "--input", str(prompts), *more)
    assert "0 prompts done" in again.stderr
    assert len(read(output)) == 7


def test_an_interrupted_run_is_carried_on(mock_address: str, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": [index + 1], "id": index}) + "\n" for index in range(400)), encoding="utf-8")
    arguments = ["generate", "--input", str(prompts), "--output", str(output), "--address", mock_address]
    arguments += ["--max-tokens", "400", "--ignore-eos", "--concurrency", "8"]
    run = subprocess.Popen([*COMMAND, *arguments], env=PLAIN, stderr=subprocess.PIPE, text=True)
    while not output.exists() or output.stat().st_size < 2000:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "carries on" in said
    before = output.read_bytes()
    assert 0 < len(before.splitlines()) < 400
    output.write_bytes(before[:-7])  # as a crash would leave it
    assert penstock(*arguments).returncode == 0
    assert [row["id"] for row in read(output)] == list(range(400))


def test_a_full_disk_is_said_and_ends_the_run(mock_address: str, prompts: Path) -> None:
    done = penstock("generate", "--input", str(prompts), "--output", "/dev/full", "--address", mock_address, "--max-tokens", "3")
    assert done.returncode == 74
    assert "/dev/full: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    write = os.write
    room = 100

    def limited(file: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = write(file, bytes(data[:room]))
        room -= size
        return size

    with Output(path) as output:
        monkeypatch.setattr(os, "write", limited)
        output.write({"id": 1, "text": "x" * 40})
        with pytest.raises(OutputError) as caught:
            output.write({"id": 2, "text": "x" * 40})
        monkeypatch.undo()
    assert caught.value.limit == "No space left on device"
    assert [row["id"] for row in read(path)] == [1]
    with Output(path) as output:
        assert output.done == {1}


def test_a_file_that_holds_something_else_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore notes\n", encoding="utf-8")
    with pytest.raises(OutputError):
        Output(path)
    assert path.read_text(encoding="utf-8") == "my notes\nmore notes\n"
    with pytest.raises(OutputError):
        Output(tmp_path / "no" / "such" / "folder")


def test_an_id_that_is_used_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": 2, "prompt": "a"}\n"the second line"\n', encoding="utf-8")
    with path.open("rb") as source, pytest.raises(InvalidRequest):
        list(read_rows(source, set()))


def test_a_result_has_all_samples_and_text_that_json_can_hold(tmp_path: Path) -> None:
    samples = (Sample("é\u2028", [1], "stop"), Sample("b", [2], "length"))
    row = result_row("x", Outcome(0, "p", Completion("r", samples, Usage(generated_tokens=2), 5)), ids=True)
    with Output(tmp_path / "out") as output:
        output.write(row)
    assert (tmp_path / "out").read_bytes().count(b"\n") == 1
    assert [sample["ids"] for sample in json.loads((tmp_path / "out").read_bytes())["samples"]] == [[1], [2]]


def test_the_latest_engine_that_is_alive_is_found(tmp_path: Path) -> None:
    runtime = str(tmp_path)
    with pytest.raises(ConnectionLost):
        default_address(runtime)
    note = announce("ipc:///mine", "tiny", runtime)
    (engines_folder(runtime) / "engine-999999999.json").write_text('{"address": "ipc:///dead", "model": "m", "pid": 999999999}')
    (engines_folder(runtime) / "engine-1x.json").write_text("not json")
    assert default_address(runtime) == "ipc:///mine"
    assert [engine["model"] for engine in running_engines(runtime)] == ["tiny"]
    note.unlink()
    engines_folder(runtime).chmod(0o755)
    with pytest.raises(OutputError):
        default_address(runtime)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A folder with a short name: the path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pen") as folder:
        yield Path(folder)


@pytest.fixture
def serving(runtime: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    environment = {**PLAIN, "XDG_RUNTIME_DIR": str(runtime)}
    process = subprocess.Popen(
        [*COMMAND, "serve", "tiny", "--executor", "mock", "--drain-timeout", "20"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, environment
    process.kill()
    process.communicate()


def test_serve_is_found_drains_on_ctrl_c_and_leaves_nothing(serving: tuple[subprocess.Popen[str], dict[str, str]], runtime: Path) -> None:
    process, environment = serving
    assert process.stdout is not None
    address = re.search(r"ipc://\S+", process.stdout.readline())
    assert address is not None
    assert json.loads(penstock("status", "--json", env=environment).stdout)["state"] == "ready"
    with Client(address[0]) as client:
        stream = client.stream("a", max_tokens=3000, ignore_eos=True)
        next(reader := iter(stream))
        process.send_signal(signal.SIGINT)
        assert [chunk.finish_reason for chunk in reader][-1] == "length"
        assert len(stream.completion().ids) == 3000
    _, said = process.communicate(timeout=40)
    assert process.returncode == 0, said
    assert "draining" in said
    assert [path for path in runtime.rglob("*") if not path.is_dir()] == []


def test_an_engine_is_repaired_and_drained_from_the_command_line(serving: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    process, environment = serving
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    with Client(address) as client:
        stream = client.stream("a", max_tokens=20_000, ignore_eos=True)
        next(reader := iter(stream))
        restarted = penstock("restart", "scheduler", env=environment)
        assert (restarted.returncode, "scheduler 0 is ready again" in restarted.stdout) == (0, True), restarted.stderr
        nobody = penstock("restart", "nobody", env=environment)
        assert (nobody.returncode, "must be one of tokenizer, detokenizer" in nobody.stderr) == (2, True), nobody.stderr
        drained = penstock("drain", env=environment)
        assert (drained.returncode, drained.stdout.startswith("draining: ")) == (0, True), drained.stderr
        assert [chunk.finish_reason for chunk in reader][-1] == "length"
        assert len(stream.completion().ids) == 20_000
    _, said = process.communicate(timeout=40)
    assert process.returncode == 0, said


def test_a_live_line_is_shown_in_a_terminal(runtime: Path) -> None:
    screen, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "XDG_RUNTIME_DIR": str(runtime), "COLUMNS": "120"}
    process = subprocess.Popen([*COMMAND, "serve", "--executor", "mock"], env=environment, stdout=terminal, stderr=terminal, stdin=terminal)
    os.close(terminal)
    seen = b""
    try:
        while b"tok/s" not in seen:
            seen += os.read(screen, 4096)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            while os.read(screen, 4096):
                pass
        except OSError:
            pass  # the terminal's other end is closed
        process.wait(30)
        os.close(screen)
    assert b"ready" in seen


def test_demo_ends_with_its_table() -> None:
    done = penstock("demo", "--streams", "8", "--max-tokens", "12", timeout=280)
    assert done.returncode == 0, done.stderr
    for name in ("requests", "tokens a second", "time to first token", "gap between tokens", "steps", "mean batch", "prefix-cache hits"):
        assert name in done.stdout
