"""The two files of an adapter out of an archive that may be hostile.

Names in it only say which members are meant; nothing is written by them. Members are read as streams and counted, whatever sizes they
claim, and so is what lies between them.
"""

from __future__ import annotations

import gzip
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.transfer import CHUNK, NEEDED, Deadline, Limits, missing, save, too_large

HEADER_BYTES = 2**20  # of a zip's directory, and of what stands before a member of a tar: both are read as a whole
MOST_MEMBERS = 10_000
_ENCRYPTED = 0x1  # a flag of a zip's member
_SHOWN = 8  # names in an error


def unpack(archive: Path, into: Path, limits: Limits, deadline: Deadline) -> int:
    """Write the two files. What kind of archive it is, its first bytes say. Returns the bytes of both. Raises `SourceError`."""
    with archive.open("rb") as file:
        magic = file.read(2)
        file.seek(0)
        if magic == b"PK":
            return _from_zip(file, into, limits, deadline)
        if magic != b"\x1f\x8b":
            return _from_tar(file, into, limits, deadline)
        with gzip.GzipFile(fileobj=file) as plain:
            return _from_tar(cast(IO[bytes], plain), into, limits, deadline)


def _from_zip(file: IO[bytes], into: Path, limits: Limits, deadline: Deadline) -> int:
    metered = _Metered(file, deadline, limits.file_bytes * 2)
    with _unpacking(deadline.shown), zipfile.ZipFile(cast(IO[bytes], metered)) as archive:
        metered.expect(limits.file_bytes * 2)  # the directory is read: from now on only members are
        members = [member for member in archive.infolist() if posixpath.basename(member.filename) in NEEDED]
        _check([member.filename for member in members], deadline.shown)
        total = 0
        for member in members:
            if member.flag_bits & _ENCRYPTED:
                raise _broken(f"{deadline.shown}: {member.filename!r} is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others need as much memory as they say
                raise _broken(f"{deadline.shown}: {member.filename!r} is neither stored nor deflated")
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                raise _broken(f"{deadline.shown}: {member.filename!r} is no regular file")
            total += _save(partial(archive.open, member), member.filename, member.file_size, into, limits, deadline)
        return total


def _from_tar(file: IO[bytes], into: Path, limits: Limits, deadline: Deadline) -> int:
    metered = _Metered(file, deadline, limits.file_bytes * 2)
    found: list[str] = []
    total = 0
    with _unpacking(deadline.shown), tarfile.open(fileobj=cast(IO[bytes], metered), mode="r|") as archive:
        for count in range(MOST_MEMBERS + 1):
            member = archive.next()
            if member is None:
                break
            if count == MOST_MEMBERS:
                raise _broken(f"{deadline.shown} has more than {MOST_MEMBERS} members")
            metered.expect(member.size)  # what is not needed is skipped when the next one is looked for
            name = posixpath.basename(member.name)
            if name not in NEEDED:
                continue
            found.append(member.name)
            if not member.isreg() or member.issparse():
                raise _broken(f"{deadline.shown}: {member.name!r} is no regular file")
            if name in map(posixpath.basename, found[:-1]):
                continue  # an error, as soon as it is known how many there are
            total += _save(partial(archive.extractfile, member), member.name, member.size, into, limits, deadline)
        metered.expect(0)
        while metered.read(CHUNK):  # to the checksum, which is at the end
            pass
    _check(found, deadline.shown)
    return total


def _save(open: Callable[[], IO[bytes] | None], path: str, size: int, into: Path, limits: Limits, deadline: Deadline) -> int:
    name = posixpath.basename(path)
    with _unpacking(deadline.shown):
        file = open()
    if file is None:
        raise _broken(f"{deadline.shown}: {path!r} is no regular file")
    with file:
        return save(_chunks(file, deadline), into, name, limits.of_file(name), deadline, size)


def _chunks(file: IO[bytes], deadline: Deadline) -> Iterator[bytes]:
    while True:
        with _unpacking(deadline.shown):
            chunk = file.read(CHUNK)
        if not chunk:
            return
        yield chunk


def _check(found: list[str], shown: str) -> None:
    """Raise `SourceError` unless there is exactly one adapter among the members' names that end as its files do."""
    names = [posixpath.basename(path) for path in found]
    for name in NEEDED:
        if name not in names:
            raise missing(shown, name)
    if len(found) > len(NEEDED) or len({posixpath.dirname(path) for path in found}) > 1:
        listed = ", ".join(repr(path[:120]) for path in found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise _broken(f"{shown} must hold one adapter, both files in one folder: it has {listed}")


def _broken(message: str) -> SourceError:
    return SourceError("broken_archive", message)


@contextmanager
def _unpacking(shown: str) -> Iterator[None]:
    """Turn what the standard library raises on what is no archive into a `SourceError`."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise _broken(f"{shown} cannot be unpacked: {str(error)[:120] or type(error).__name__}") from error


class _Metered:
    """A file that gives no more than is expected of it: readers of archives take a header's word for how long it is. Raises `SourceError`
    when more is asked for, or time is up."""

    def __init__(self, file: IO[bytes], deadline: Deadline, most: int) -> None:
        self._file = file
        self._deadline = deadline
        self._most = most
        self._left = most + HEADER_BYTES  # in all
        self._expected = HEADER_BYTES  # until something is expected again

    def expect(self, bytes: int) -> None:
        self._expected = max(bytes, 0) + HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        self._deadline.left()
        most = min(self._left, self._expected)
        data = self._file.read(most + 1 if size < 0 else min(size, most + 1))
        self._left -= len(data)
        self._expected -= len(data)
        if self._left < 0:
            raise too_large(f"{self._deadline.shown}, unpacked,", self._most)
        if self._expected < 0:
            raise _broken(f"{self._deadline.shown} has headers of more than {HEADER_BYTES} bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Whoever opened the file closes it."""
