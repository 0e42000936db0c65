"""Where engines of this user listen: `penstock serve` leaves a note, and clients without an address read the latest.

Notes live in a folder that only the user may enter: whoever could write there could hand a client to an engine of theirs.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from penstock.clients.errors import ConnectionLost, OutputError


def engines_folder(runtime: str | None = None) -> Path:
    """The folder of the notes, made with mode 0700 if it is not there: in `runtime`, else in the user's runtime folder as the desktop or
    the system set it, else in the one for temporary files. Raises `OutputError` if it cannot be made or is open to others."""
    base = Path(runtime or os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"penstock-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise OutputError(f"cannot make the folder of running engines, {folder}: {error.strerror}") from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise OutputError(f"{folder} must be a folder of this user that nobody else may enter (mode 0700)")
    return folder


def announce(address: str, model: str, runtime: str | None = None) -> Path:
    """Leave a note of an engine that this process runs. Returns the file: remove it when the engine ends."""
    note = engines_folder(runtime) / f"engine-{os.getpid()}.json"
    draft = note.with_suffix(".new")
    try:
        draft.write_text(json.dumps({"address": address, "model": model, "pid": os.getpid()}), encoding="utf-8")
        draft.replace(note)
    except OSError as error:
        raise OutputError(f"cannot write {note}: {error.strerror}") from error
    return note


def running_engines(runtime: str | None = None) -> list[dict[str, Any]]:
    """The notes of engines whose process is alive (address, model, pid), the latest first. Notes of dead ones are removed."""
    found: list[tuple[float, dict[str, Any]]] = []
    for note in engines_folder(runtime).glob("engine-*.json"):
        try:
            facts = json.loads(note.read_text(encoding="utf-8"))
            os.kill(facts["pid"], 0)
            found.append((note.stat().st_mtime, {"address": str(facts["address"]), "model": str(facts["model"]), "pid": facts["pid"]}))
        except ProcessLookupError:
            note.unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written or removed, or not ours to judge
    return [facts for _, facts in sorted(found, key=lambda pair: pair[0], reverse=True)]


def default_address(runtime: str | None = None) -> str:
    """The address of the engine that was started last. Raises `ConnectionLost` if none is running."""
    engines = running_engines(runtime)
    if not engines:
        raise ConnectionLost("no engine is running: start one with `penstock serve`, or give its address")
    return str(engines[0]["address"])
