"""Actors that never get ready: named, ended, and started anew."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.actors.protocol import Chunks
from penstock.clients.errors import StartError
from penstock.clients.launcher import Engine


def newest_child(pid: int, before: set[int]) -> psutil.Process:
    """The first child of a process that was not there before."""
    while True:
        for child in psutil.Process(pid).children():
            if child.pid not in before:
                return child
        time.sleep(0.001)


def read_events(log: Path, *names: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] in names]


def test_an_engine_with_an_actor_that_hangs_while_it_starts_says_which() -> None:
    with Engine("tiny", executor="mock", start_timeout=10.0) as engine:
        while not (born := [child for child in psutil.Process(engine.pid).children() if child.name() == "tokenizer0"]):
            time.sleep(0.001)
        born[0].suspend()  # while it loads its files
        with pytest.raises(StartError, match="tokenizer") as caught:
            engine.wait(60)
    assert (caught.value.actor, caught.value.field) == ("tokenizer", "start_timeout")


def test_an_actor_that_freezes_before_its_first_word_is_replaced(tmp_path: Path, connect: Callable[[str], Any]) -> None:
    log = tmp_path / "log.jsonl"
    with Engine("tiny", executor="mock", stall_timeout=4.0, lease=60.0, log_file=str(log)) as engine:
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        victim = next(row["pid"] for row in raw.status()["actors"] if row["kind"] == "tokenizer")
        log.rename(tmp_path / "before.jsonl")
        os.mkfifo(log)  # who opens its log waits for somebody who reads it
        before = {child.pid for child in psutil.Process(engine.pid).children()}
        os.kill(victim, signal.SIGKILL)
        newest_child(engine.pid, before).suspend()
        raw.generate("waiting", prompt="hello there", params={"max_tokens": 5})
        log.unlink()
        log.touch()
        assert raw.wait(Chunks, lambda message: bool(message.done), 60.0).done[0][1]["generated_tokens"] == 5
    (late,) = read_events(tmp_path / "before.jsonl", "not ready")
    assert (late["kind"], late["up"]) == ("tokenizer", False)


def test_what_lies_in_the_folder_that_it_is_started_in_is_none_of_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched", "select", "tokenize", "random", "types"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('this is no module of Python: {name}')")
    monkeypatch.chdir(tmp_path)
    with Engine("tiny", executor="mock") as engine:
        engine.wait(60)
