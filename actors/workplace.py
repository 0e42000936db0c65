"""The folder of one engine's sockets: private, locked while the engine lives, gone when it ends."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from penstock.actors.errors import Refusal

LONGEST_PATH = 80  # bytes: the kernel limits a socket's path to 107, and its name is up to 26


def runtime_root() -> Path:
    """The folder of all engines of this user, mode 0700. Raises `Refusal` if somebody else could write to it."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    root = base / f"penstock-{os.getuid()}"
    _make_private(root)
    return root


class Workplace:
    """Owns one folder. Sockets in it are bound by the actors; `close` removes whatever is left."""

    def __init__(self, directory: str | None) -> None:
        self._made: Path | None = None  # the folder around it, if that is our doing too
        if directory is None:
            root = runtime_root()
            _remove_abandoned(root)
            self.path = root / secrets.token_hex(4)
        else:
            # Never the folder itself: it may hold what is not ours, and all of this one is removed at the end.
            self.path = Path(directory) / secrets.token_hex(4)
        if len(os.fsencode(self.path)) > LONGEST_PATH:
            text = f"the path {self.path} is too long for sockets"
            raise Refusal("start_error", text, field="directory", value=str(self.path), limit=f"{LONGEST_PATH} bytes")
        if directory is not None:
            self._made = None if self.path.parent.exists() else self.path.parent
            _make_private(self.path.parent)
            _remove_abandoned(self.path.parent)
        _make_private(self.path)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise Refusal("start_error", f"an engine is running in {self.path}", field="directory", value=str(self.path)) from error

    def address(self, scheme: str, name: str) -> str:
        """One that was never used before."""
        return f"{scheme}{self.path}/{name}.{secrets.token_hex(3)}"

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        if self._made is not None:
            with suppress(OSError):  # somebody may have put something there
                self._made.rmdir()


def _make_private(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode) or info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise Refusal("start_error", f"{path} must belong to this user with mode 0700", field="directory", value=str(path))


def _remove_abandoned(root: Path) -> None:
    """Remove folders whose engine is gone: nobody holds their lock."""
    for folder in root.iterdir():
        if folder.is_symlink() or not (folder / "lock").is_file():
            continue
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
