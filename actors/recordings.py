"""Where recordings are kept: files that only this user can read, and no more than a few of them."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from penstock.actors.config import EngineConfig
from penstock.actors.workplace import runtime_root

KEPT = 8  # files in a folder: an engine that crashes again and again must not fill a disk
DRAFT_S = 600.0  # a file that is not whole this long after it was last written to never will be: its writer was killed
_OURS = re.compile(r"scheduler-\d{8}-\d{6}-[0-9a-f]{6}\.(recording|new)")  # the folder may be one where others keep things, too


def recordings_folder(config: EngineConfig) -> Path:
    """As configured, else the log file's, else one of this user's. Raises `Refusal` if that one is not private."""
    if config.record_folder is not None:
        return Path(config.record_folder)
    return Path(config.log_file).parent if config.log_file is not None else runtime_root() / "recordings"


def keep(folder: Path, data: bytes) -> Path:
    """Write a recording to a new file of mode 0600, and remove the oldest, and what is left of those that were cut off. It appears under
    its name when it is whole. Raises `OSError`."""
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
    with suppress(OSError):  # it is kept, whatever cannot be removed
        _tidy(folder)
    return path


def _tidy(folder: Path) -> None:
    now = time.time()
    kept: list[tuple[float, Path]] = []
    drafts: list[tuple[float, Path]] = []
    for found in folder.iterdir():
        if _OURS.fullmatch(found.name):
            with suppress(OSError):  # another engine may be removing the same
                info = found.lstat()
                if stat.S_ISREG(info.st_mode):
                    (kept if found.suffix == ".recording" else drafts).append((info.st_mtime, found))
    old = [found for _, found in sorted(kept)[:-KEPT]] + [found for changed, found in drafts if now - changed > DRAFT_S]
    for found in old:
        with suppress(OSError):
            found.unlink()
