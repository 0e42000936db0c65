"""Where compiled kernels are kept from one start to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Only its owner may write there: what lies in it is run. Raises `OSError`."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"{folder}: others may write to it")
    return folder
