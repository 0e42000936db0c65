"""What the scheduler tells the world: the tokens of a step, the ends of streams, and its counters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.engine.plan import Int32, StepPlan, TopLogprobs

PromptLogprobs = tuple[int, int, TopLogprobs]  # handle, attempt, the prompt's tokens from the second on


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """The last word on a stream: why, and what it cost. `queue_s` to its first step, `prefill_s` to its first token."""

    handle: int
    attempt: int
    reason: str  # stop, length, cancelled, deadline, queue_timeout
    cached_tokens: int
    preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """What a step produced: row i is token `ids[i]`, at `offsets[i]` among the generated tokens of `handles[i]`."""

    handles: npt.NDArray[np.int64]
    attempts: Int32
    offsets: Int32
    ids: Int32
    ended: list[Ended]
    rows: Int32  # index of each row among the step's sampled ids, for `logprobs`
    logprobs: TopLogprobs | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()  # once a stream, with its first token


@dataclass(slots=True)
class Counters:
    """Sums since the start, for status reports."""

    steps: int = 0
    rows: int = 0
    query_tokens: int = 0
    sampled_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0

    def count(self, plan: StepPlan) -> None:
        self.steps += 1
        self.rows += len(plan.slots)
        self.query_tokens += plan.query_tokens
