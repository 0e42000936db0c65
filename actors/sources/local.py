"""Adapters in folders of this machine.

Links are followed as long as they stay in a folder that is allowed, such as those in a hub's cache. What is opened is what was checked:
each part of the resolved path is opened by itself, and none of them may be a link by now.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Allowed, Source, inside
from penstock.actors.sources.transfer import NEEDED, Deadline, Fetched, Limits, Settings, missing, save

PART = 2**22  # bytes that are copied at once


def fetch(source: Source, into: Path, token: str | None, limits: Limits, settings: Settings) -> Fetched:
    deadline = Deadline.of(limits, source.shown)
    facts, total = [], 0
    for name in NEEDED:
        with _opened(source, name, settings.allowed) as file:
            before = os.fstat(file)
            total += save(_chunks(file, source, name), into, name, limits.of_file(name), deadline, before.st_size)
            if _facts(os.fstat(file)) != _facts(before):
                raise SourceError("changed", f"{source.shown}: {name} was written to while it was copied")
            facts.append(_facts(before))
    return Fetched("/".join(facts), total)


def probe(source: Source, token: str | None, limits: Limits, settings: Settings) -> str:
    facts = []
    for name in NEEDED:
        with _opened(source, name, settings.allowed) as file:
            facts.append(_facts(os.fstat(file)))
    return "/".join(facts)


def _facts(info: os.stat_result) -> str:
    return f"{info.st_size}-{info.st_mtime_ns}"


def _chunks(file: int, source: Source, name: str) -> Iterator[memoryview]:
    """Each is good until the next one is asked for."""
    part = memoryview(bytearray(PART))
    while True:
        try:
            size = os.readv(file, [part])
        except OSError as error:
            raise SourceError("unreachable", f"{source.shown}: {name} cannot be read: {error.strerror}") from error
        if not size:
            return
        yield part[:size]


@contextmanager
def _opened(source: Source, name: str, allowed: Allowed) -> Iterator[int]:
    """The descriptor of a regular file. Raises `SourceError`."""
    path = os.path.join(source.place, name)
    for folder in allowed.folders:
        way = inside(path, folder)
        if way is not None:
            break
    else:
        raise SourceError("not_listed", f"{source.shown}: {name} leads out of the folders that the operator of this engine allows")
    try:
        # Opening a pipe would wait for its other end.
        file = _walk(os.path.realpath(folder), way.split("/"), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _failure(error, source, name) from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise SourceError("not_found", f"{source.shown}: {name} is no regular file")
        yield file
    finally:
        os.close(file)


def _walk(root: str, parts: list[str], flags: int) -> int:
    """Open what lies so many parts below a folder, with no link on the way. Raises `OSError`."""
    here = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        return os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)


def _failure(error: OSError, source: Source, name: str) -> SourceError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        there = os.path.isdir(source.place)
        return missing(source.shown, name) if there else SourceError("not_found", f"{source.shown} is no folder of this machine")
    if error.errno in (errno.EACCES, errno.EPERM):
        return SourceError("not_allowed", f"{source.shown}: {name} is not readable for the engine's user")
    if error.errno == errno.ELOOP:  # it was none when it was resolved: somebody is swapping it
        return SourceError("not_listed", f"{source.shown}: {name} became a link while it was opened")
    return SourceError("unreachable", f"{source.shown}: {name} cannot be opened: {error.strerror}")
