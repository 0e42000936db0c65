"""Where compiled kernels are kept from one start to the next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Only its owner may write there: what lies in it is run. Raises `OSError`."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"{folder}: others may write to it")
    return folder


@contextmanager
def made_apart(file: Path) -> Iterator[Path]:
    """A path to make `file` at, which then takes its place: another process may do the same at the same time. Raises `OSError`."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        yield made
        made.rename(file)
