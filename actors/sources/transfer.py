"""What all kinds of sources share: the two files of an adapter, limits, a deadline, and writing what comes to disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Self

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Allowed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEEDED = (CONFIG, WEIGHTS)  # the config first: without it there is no adapter, whatever else there is
CONFIG_BYTES = 2**20  # it is a page of text, and is read as a whole by whoever reads it
CHUNK = 2**18  # bytes that are moved at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one fetch or probe. Sizes in bytes, times in seconds."""

    file_bytes: int = 4 * 2**30  # of a file, and of an archive
    connect: float = 10.0
    read: float = 30.0  # without a single byte
    total: float = 600.0  # from begin to end, however it trickles
    stop: Event = field(default_factory=Event, compare=False)  # set when nobody waits for it any more: it ends at the next chunk

    def of_file(self, name: str) -> int:
        return min(self.file_bytes, CONFIG_BYTES) if name == CONFIG else self.file_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator set when the engine started."""

    allowed: Allowed = field(default_factory=Allowed)
    hub_endpoint: str | None = None  # none: as huggingface_hub is configured
    s3_endpoint: str | None = None  # for MinIO and such; none: as AWS's own configuration says


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched. `probe` returns the same revision for as long as nothing has changed; it is empty if the place tells nothing that
    a change could be told by."""

    revision: str
    bytes: int  # of both files


@dataclass(frozen=True, slots=True)
class Deadline:
    """What is left of a transfer's time, and how much of that connecting or one read may take."""

    ends: float  # of the monotonic clock
    limits: Limits
    shown: str  # the source, for errors

    @classmethod
    def of(cls, limits: Limits, shown: str) -> Self:
        return cls(time.monotonic() + limits.total, limits, shown)

    def left(self) -> float:
        """Seconds, above 0. Raises `SourceError` when there are none, or when it is to stop."""
        if self.limits.stop.is_set():
            raise SourceError("stopped", f"{self.shown} is not waited for any more")
        left = self.ends - time.monotonic()
        if left <= 0:
            raise SourceError("timed_out", f"{self.shown} is not finished after {self.limits.total:g} s")
        return left

    def connect(self) -> float:
        return min(self.limits.connect, self.left())

    def read(self) -> float:
        return min(self.limits.read, self.left())


def save(chunks: Iterable[bytes | memoryview], into: Path, name: str, most: int, deadline: Deadline, declared: int | None = None) -> int:
    """Write a new file of mode 0600. Returns its bytes. `declared`: how many there will be, if the place says so; they are counted all the
    same. Raises `SourceError`."""
    if declared is not None and declared > most:
        raise too_large(f"{deadline.shown}: {name}", most, declared)
    written = 0
    with _writing(name):
        file = os.open(into / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for chunk in chunks:
            written += len(chunk)
            if written > most:
                raise too_large(f"{deadline.shown}: {name}", most)
            deadline.left()
            view = memoryview(chunk)
            with _writing(name):
                while view:
                    view = view[os.write(file, view) :]
    finally:
        os.close(file)
    return written


def missing(shown: str, name: str) -> SourceError:
    """That one of the two files is not there."""
    if name == WEIGHTS:
        return SourceError("no_safetensors", f"{shown} has no {WEIGHTS}: weights of no other kind are read")
    return SourceError("not_found", f"{shown} has no {name}")


def too_large(what: str, most: int, bytes: int | None = None) -> SourceError:
    return SourceError("too_large", f"{what} has {'more' if bytes is None else f'{bytes} bytes, more'} than {most} bytes")


@contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError("disk", f"{name} cannot be written: {error.strerror}") from error
