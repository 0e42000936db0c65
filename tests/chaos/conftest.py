"""Nothing may be left over: no process, no folder, no socket, no shared memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def leftovers() -> set[str]:
    """What an engine could leave on this machine, of this process's doing."""
    children = {f"process {child.pid} {child.name()}" for child in psutil.Process().children(recursive=True)}
    segments = {f"shared memory {name}" for name in os.listdir("/dev/shm")}
    return children | segments


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for all that engines make; empty again at the end."""
    with tempfile.TemporaryDirectory(prefix="ps-") as name:
        folder = Path(name)
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        before = leftovers()
        yield folder
        for _ in range(50):
            if leftovers() <= before:
                break
            time.sleep(0.1)
        assert leftovers() <= before
        assert [path for path in folder.rglob("*") if path.parent != folder] == []
