"""Scheduler and runner in one loop, as the actors run them, without the actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.engine.lora.residency import Load
from penstock.engine.plan import Pending, StepRunner, TopLogprobs
from penstock.engine.request import Adapter, Request, Sampler
from penstock.engine.scheduler import Scheduler, SchedulerConfig


@dataclass
class Outcome:
    """What one stream produced: its ids, why it ended, and for those who asked the rows of its log-probabilities, one a token."""

    ids: list[int] = field(default_factory=list)
    reason: str = ""
    preemptions: int = 0
    cached_tokens: int = 0
    logprobs: list[tuple[list[int], list[float], int]] = field(default_factory=list)
    prompt_logprobs: TopLogprobs | None = None


def request(
    handle: int, prompt: Sequence[int], limit: int, sampler: Sampler | None = None, generated: Sequence[int] = (),
    adapter: Adapter | None = None,
) -> Request:  # fmt: skip
    return Request(
        handle=handle,
        attempt=0,
        prompt=np.array(prompt, np.int32),
        generated=np.array(generated, np.int32),
        limit=limit,
        sampler=sampler or Sampler(),
        adapter=adapter,
    )


def run(
    runner: StepRunner, config: SchedulerConfig, waves: Sequence[Sequence[Request]], lookahead: int = 1,
    load: Callable[[Load], None] = lambda _: None, step_s: float = 0.0,
) -> dict[int, Outcome]:  # fmt: skip
    """Run all requests to their end with up to `lookahead + 1` plans in flight. Each wave is submitted when the one before has ended.
    `load` puts adapters into their pages. A step takes `step_s` of the scheduler's time."""
    scheduler = Scheduler(config)
    outcomes = {request.handle: Outcome() for wave in waves for request in wave}
    launched: deque[Pending] = deque()
    now = 0.0
    for wave in waves:
        for value in wave:
            scheduler.submit(value, now)
        while True:
            now += step_s
            while len(launched) <= lookahead and (plan := scheduler.plan(now)) is not None:
                launched.append(runner.launch(plan))
            loads = scheduler.take_loads()
            for one in loads:
                load(one)
                scheduler.loaded(one.number, now)
            if loads:
                continue
            if not launched and step_s and scheduler.waiting:
                continue  # for an adapter's turn, which comes with time
            if not launched:
                break
            result = launched.popleft().result()
            assert result.error is None, result.error
            commit = scheduler.commit(result, now)
            told = commit.logprobs
            for handle, token, row in zip(commit.handles.tolist(), commit.ids.tolist(), commit.rows.tolist(), strict=True):
                outcomes[handle].ids.append(token)
                for at in np.flatnonzero(told.rows == row) if told is not None else ():
                    outcomes[handle].logprobs.append((told.ids[at].tolist(), told.values[at].tolist(), int(told.ranks[at])))
            for handle, _, top in commit.prompt_logprobs:
                outcomes[handle].prompt_logprobs = top
            for ended in commit.ended:
                outcome = outcomes[ended.handle]
                outcome.reason, outcome.preemptions, outcome.cached_tokens = ended.reason, ended.preemptions, ended.cached_tokens
    return outcomes
