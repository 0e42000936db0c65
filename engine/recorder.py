"""The flight recorder: a scheduler that remembers its last inputs, and the plans it answered with.

The scheduler is deterministic, so its state at one moment and the calls since then are all it takes to get the same plans again. The
ring is made of two segments, each a snapshot with the calls after it. When the newer one has half of the ring's bytes, the older one
goes and another begins: so a recording can always start somewhere, also under a load that never lets the scheduler become empty.

While it runs it only keeps references to what was there anyway. `engine.recording` makes a file of them, and keeps ids out of it;
`engine.replay` runs one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.engine.commit import Commit
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.request import Adapter, Request, Sampler
from penstock.engine.scheduler import Scheduler, SchedulerConfig
from penstock.engine.snapshot import Snapshot, take

# About what is kept alive, in bytes.
CALL = 120
REQUEST = 1500
TOKEN = 8  # of a request: its ids in the request and in the stream
DIGEST = 64
ROW = 40  # of a plan, with the row list that waits for its results
ENTRY = 12  # of a block table
BIAS = 120  # a pair of numbers, as Python has them
ID = 36  # one in a tuple
WORD = 48  # a tuple


@dataclass(slots=True, eq=False)
class Call:
    """One call of one of the scheduler's inputs. `value` is what it was given besides the time, `answer` what is compared or needed later;
    `done` is false if it raised."""

    kind: str
    now: float
    value: Any = None
    answer: Any = None
    done: bool = False


@dataclass(slots=True, eq=False)
class Segment:
    start: Snapshot
    calls: list[Call] = field(default_factory=list)
    bytes: int = 0


class RecordedScheduler(Scheduler):
    """A scheduler whose calls are kept, in about `most` bytes besides two snapshots. `text`: with token ids."""

    __slots__ = ("_most", "_segments", "text")  # apart from the state, which is in the instance's `__dict__`: see `snapshot.attributes`

    def __init__(self, config: SchedulerConfig, most: int, *, text: bool = False) -> None:
        super().__init__(config)
        self.text = text
        self._most = most // 2
        self._segments = [Segment(take(self, text=text))]

    @property
    def start(self) -> Snapshot:
        """The state before the oldest call that is kept."""
        return self._segments[0].start

    @property
    def calls(self) -> list[Call]:
        return [call for segment in self._segments for call in segment.calls]

    def submit(self, request: Request, now: float) -> None:
        known = len(request.prompt) + len(request.generated)
        ids = TOKEN * known + DIGEST * (known // self.config.block_size)
        call = self._called("submit", now, request, REQUEST + _wishes(request.sampler) + ids)
        super().submit(request, now)
        # A list that grows as blocks fill: it stands for the ids, which the scheduler needs for nothing else.
        call.answer, call.done = self._streams[request.handle].digests, True

    def abort(self, handle: int, now: float, reason: str = "cancelled") -> None:
        call = self._called("abort", now, (handle, reason))
        super().abort(handle, now, reason)
        call.done = True

    def loaded(self, number: int, now: float) -> None:
        call = self._called("loaded", now, number)
        super().loaded(number, now)
        call.done = True

    def lost(self, number: int, now: float) -> None:
        call = self._called("lost", now, number)
        super().lost(number, now)
        call.done = True

    def pin(self, adapter: Adapter, now: float) -> bool:
        call = self._called("pin", now, adapter)
        pinned = super().pin(adapter, now)
        call.done = True
        return pinned

    def unpin(self, digest: bytes) -> None:
        call = self._called("unpin", 0.0, digest)
        super().unpin(digest)
        call.done = True

    def expire(self, now: float) -> None:
        call = self._called("expire", now)
        super().expire(now)
        call.done = True

    def plan(self, now: float) -> StepPlan | None:
        call = self._called("plan", now)
        plan = call.answer = super().plan(now)
        call.done = True
        if plan is not None:
            self._segments[-1].bytes += 10 * CALL + ROW * len(plan.slots) + ENTRY * len(plan.table_slots) + plan.tokens.nbytes
            for fill in plan.fills:
                self._segments[-1].bytes += fill.history.nbytes  # a copy of its own each time that a stream comes back to a slot
        return plan

    def commit(self, result: StepResult, now: float) -> Commit:
        launched = self._launched[0] if self._launched else None  # who sampled what, and whether it is a stop id, is told from it later
        call = self._called("commit", now, (result.step, result.ids, launched), 2 * CALL + result.ids.nbytes)
        commit = super().commit(result, now)
        call.done = True
        return commit

    def _called(self, kind: str, now: float, value: Any = None, more: int = 0) -> Call:
        """Kept before it is run: the last call of a recording may be the one that the scheduler could not bear."""
        segment = self._segments[-1]
        if segment.bytes > self._most:
            segment = Segment(take(self, text=self.text))
            self._segments = [self._segments[-1], segment]
        call = Call(kind, now, value)
        segment.calls.append(call)
        segment.bytes += CALL + more
        return call


def _wishes(sampler: Sampler) -> int:
    """What the lists of a sampler take: most have none, and some a megabyte."""
    words = sum(map(len, sampler.bad_words)) if sampler.bad_words else 0
    ids = words + len(sampler.allowed_tokens) + len(sampler.stop_ids)
    return BIAS * len(sampler.logit_bias) + WORD * len(sampler.bad_words) + ID * ids
