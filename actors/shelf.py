"""Adapters on disk that are ready for a device: files by their digest, the longest unused of which go when they take too much."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Shelf:
    """A folder of files `<digest>.safetensors` that take at most `limit` bytes, or the newest one more. Several engines may share it: a
    file is whole or not there, and one that is gone is made again."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

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
        for entry in os.scandir(self.folder):
            with suppress(OSError):  # another engine may be tidying, too
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self.limit:
                break
            if path.endswith(".safetensors") and path != str(self.path(keep)):
                Path(path).unlink(missing_ok=True)
                left -= size
        return left
