"""Where recordings are kept: files that only this user can read, and no more than a few of them."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from penstock.actors.config import EngineConfig
from penstock.actors.workplace import runtime_root

KEPT = 8  # files in a folder: an engine that crashes again and again must not fill a disk


def recordings_folder(config: EngineConfig) -> Path:
    """As configured, else the log file's, else one of this user's. Raises `Refusal` if that one is not private."""
    if config.record_folder is not None:
        return Path(config.record_folder)
    return Path(config.log_file).parent if config.log_file is not None else runtime_root() / "recordings"


def keep(folder: Path, data: bytes) -> Path:
    """Write a recording to a new file of mode 0600, and remove the oldest. It appears under its name when it is whole. Raises `OSError`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"scheduler-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.recording"
    draft = path.with_suffix(".new")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # another engine may be removing the same
        for old in sorted(folder.glob("scheduler-*.recording"), key=lambda found: found.stat().st_mtime)[:-KEPT]:
            old.unlink()
    return path
