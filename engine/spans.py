"""When a step ran on the device: two marks around it, and the one that ended the step before. Read once the step is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A moment of what a device runs, as a `torch.cuda.Event` is one of a stream."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to another."""
        ...


class HostMark:
    """A moment of the host's clock: a CPU has run what comes before."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostMark) -> float:
        return (end.at - self.at) * 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """`before` is the end of the step before, if there was one."""

    before: Mark | None
    begin: Mark
    end: Mark

    def read(self) -> tuple[float, float]:
        """Wait for the end. Returns the seconds that the step ran, and those for which there was none before it. Raises `RuntimeError` if
        the step failed on the device."""
        self.end.synchronize()
        idle = 0.0 if self.before is None else max(0.0, self.before.elapsed_time(self.begin))
        return self.begin.elapsed_time(self.end) / 1e3, idle / 1e3


class SpanClock:
    """Marks what one stream runs, step after step: `begin` when what a step needs is on its way, `end` when all of it was launched."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._before: Mark | None = None
        self._begin: Mark | None = None

    def begin(self) -> None:
        self._begin = self._mark()

    def end(self) -> Span | None:
        """None if the step did not even begin."""
        begin, before, self._begin = self._begin, self._before, None
        if begin is None:
            return None
        end = self._before = self._mark()
        return Span(before, begin, end)

    def _mark(self) -> Mark:
        mark: Mark = torch.cuda.Event(enable_timing=True) if self._on_cuda else HostMark()  # type: ignore[no-untyped-call]
        mark.record()
        return mark
