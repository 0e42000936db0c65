"""The fork server: what becomes of actors that were asked of it."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from penstock.actors.actor import Post
from penstock.actors.config import EngineConfig
from penstock.actors.forkserver import NEEDLESS, ForkServer
from penstock.actors.worker import ProcessWorker
from penstock.clients import launch


def post(folder: Path, kind: str = "tokenizer", incarnation: int = 1) -> Post:
    config = EngineConfig(executor="mock", log_file=str(folder / "log"))
    return Post(kind, 0, incarnation, f"ipc://{folder}/{kind}", f"ipc://{folder}/supervisor", str(folder), config)


def wait_gone(pid: int) -> None:
    """Nobody here is its parent: whoever is may leave it as a zombie."""
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def test_an_actor_that_nobody_wants_any_more_ends_and_leaves_the_engines_folder_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("e")
    forks = ForkServer()
    try:
        ProcessWorker(post(folder), forks).close()
        while (news := forks.born()) is None:
            time.sleep(0.01)
        wait_gone(news[1])
        assert folder.is_dir()
    finally:
        forks.close()


def test_one_that_imports_may_take_longer_than_one_that_only_has_to_fork(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("e")
    forks = ForkServer()
    workers: list[ProcessWorker] = []

    def ask(kind: str) -> float:
        workers.append(ProcessWorker(post(folder, kind, len(workers) + 1), forks))
        return time.monotonic()

    def make() -> None:
        while forks.born() is None:
            time.sleep(0.01)

    try:
        assert forks.stalled(time.monotonic() + 1e6, 10.0, 100.0) is None  # nothing was asked of it
        for kind, patience in (("tokenizer", 100.0), ("tokenizer", 10.0), ("executor", 100.0), ("executor", 10.0)):
            asked = ask(kind)
            assert forks.stalled(asked + patience - 0.5, 10.0, 100.0) is None
            assert forks.stalled(asked + patience + 0.5, 10.0, 100.0) is not None
            make()
    finally:
        for one in workers:
            one.close()
        forks.close()


def test_packages_that_transformers_only_imports_because_they_are_there_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NEEDLESS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from pathlib import Path\nPath(__file__).with_name('imported').touch()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with launch("tiny") as client:
        assert client.generate("x", max_tokens=4).ids
    assert not list(tmp_path.glob("*/imported"))
