"""Adapters on disk that are ready for a device: files by their digest, the longest unused of which go when they take too much."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

BLOCK = 512  # bytes, in which files are counted
ABANDONED_S = 86_400.0  # after so long nobody is at an adapter any more that is being made ready, in a folder of its own


class Shelf:
    """A folder of files `<digest>.safetensors`. They and those in the folders beside it, for other models, take at most `limit` bytes, or
    the newest one more. Several engines may share it: a file is whole or not there, and one that is gone is made again."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in folder.iterdir():  # by an engine that was killed
            with suppress(OSError):
                if left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"

    def find(self, digest: str) -> Path | None:
        """The file of an adapter, which now counts as used; None if it is not there."""
        path = self.path(digest)
        with suppress(OSError):
            os.utime(path)
            return path
        return None

    def tidy(self, keep: str) -> int:
        """Remove what is too much, `keep` excepted. Returns the bytes that are left."""
        files = []
        for path in {path.resolve() for path in self.folder.parent.glob("*/*.safetensors")}:
            with suppress(OSError):  # another engine may be tidying, too
                found = path.stat()
                files.append((found.st_mtime_ns, min(found.st_size, found.st_blocks * BLOCK), path))  # zeros may take nothing
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self.limit:
                break
            if path != self.path(keep).resolve():
                path.unlink(missing_ok=True)
                left -= size
        return left
