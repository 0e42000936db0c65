"""The examples are what a user copies first: each is short, and each runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


def test_quickstart() -> None:
    assert "tokens in" in run("quickstart.py")


def test_many_streams() -> None:
    assert run("many_streams.py").count("\n- ") >= 5


def test_pipeline_stage() -> None:
    lines = [line for line in run("pipeline_stage.py").splitlines() if line.startswith("- ")]
    topics = ["lists", "sets", "files", "classes", "modules", "errors"]
    assert [line.split(" are")[0] for line in lines] == [f"- In Python, {topic}" for topic in topics]


def test_jsonl_batch_carries_on(tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    source.write_text('"A list is"\n{"prompt": "A set is", "id": "set", "max_tokens": 3}\n"A file is"\n', encoding="utf-8")
    target.write_text('{"id": 1, "text": "kept"}\n{"id": 3, "te', encoding="utf-8")
    assert "2 done now, 1 before" in run("jsonl_batch.py", str(source), str(target))
    rows = {row["id"]: row["text"] for row in map(json.loads, target.read_text(encoding="utf-8").splitlines())}
    assert rows.keys() == {1, "set", 3}
    assert rows[1] == "kept"
