"""When streams run out of time."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from penstock.engine.stream import Stream

SWEEP = 1024  # entries, at least, before those of streams that ended in time are dropped


class Deadlines:
    """A heap of points in time. Like everywhere in the scheduler, `now` is a value."""

    __slots__ = ("_heap", "_sweep_at")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, Stream]] = []  # (when, the stream's number, reason, stream)
        self._sweep_at = SWEEP

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, stream: Stream) -> None:
        for when, reason in ((stream.request.deadline, "deadline"), (stream.request.queue_timeout, "queue_timeout")):
            if when is not None:
                heappush(self._heap, (when, stream.number, reason, stream))
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if not entry[3].gone]
            heapify(self._heap)
            self._sweep_at = max(SWEEP, 2 * len(self._heap))

    def due(self, now: float) -> Iterator[tuple[Stream, str]]:
        """Streams whose time is over, and the reason. The caller ends each before it asks for the next."""
        while self._heap and self._heap[0][0] <= now:
            _, _, reason, stream = heappop(self._heap)
            if not stream.gone and (reason == "deadline" or stream.started is None):
                yield stream, reason
