"""Between the engine's values and their messages: numpy columns to buffers, and back without copying."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.actors.messages import Step, StepDone, Submit
from penstock.engine.plan import Fill, Int32, StepPlan, StepResult, TopLogprobs
from penstock.engine.request import Adapter, Request, Sampler

_NEUTRAL = Sampler()
_SAMPLER_FIELDS = tuple(spec.name for spec in fields(Sampler))


def int32(buffer: bytes) -> Int32:
    return np.frombuffer(buffer, np.int32)


def int64(buffer: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(buffer, np.int64)


def sampler_to_wire(sampler: Sampler) -> dict[str, Any]:
    """Only what differs from neutral: most requests set two or three of its fields."""
    return {name: value for name in _SAMPLER_FIELDS if (value := getattr(sampler, name)) != getattr(_NEUTRAL, name)}


def request_from(message: Submit) -> Request:
    return Request(
        handle=message.handle,
        attempt=message.attempt,
        prompt=int32(message.prompt),
        generated=int32(message.generated),
        limit=message.limit,
        sampler=Sampler(**message.sampler),
        priority=message.priority,
        tenant=message.tenant,
        salt=message.salt,
        deadline=message.deadline,
        queue_timeout=message.queue_timeout,
        adapter=Adapter(*message.adapter) if message.adapter else None,
    )


def step_from_plan(plan: StepPlan, scheduler: int, executor: int) -> Step:
    # tuple([…]), here and below: one made from a generator is trimmed to its size, and then fills CPython's free list of that size, which
    # only a full collection empties. Up to 5 MB in a process that makes thousands of them.
    fills = tuple([(one.slot, one.prompt_tokens, sampler_to_wire(one.sampler), one.history.tobytes(), one.pages) for one in plan.fills])
    return Step(
        scheduler, executor, plan.step, fills, plan.table_slots.tobytes(), plan.table_columns.tobytes(), plan.table_blocks.tobytes(),
        plan.slots.tobytes(), plan.starts.tobytes(), plan.counts.tobytes(), plan.decodes, plan.samples.tobytes(), plan.tokens.tobytes(),
    )  # fmt: skip


def plan_from_step(step: Step) -> StepPlan:
    fills = tuple([Fill(slot, prompt, Sampler(**sampler), int32(history), pages) for slot, prompt, sampler, history, pages in step.fills])
    return StepPlan(
        step.step, fills, int32(step.table_slots), int32(step.table_columns), int32(step.table_blocks), int32(step.slots),
        int32(step.starts), int32(step.counts), step.decodes, np.frombuffer(step.samples, np.bool_), int32(step.tokens),
    )  # fmt: skip


def _logprobs_to_wire(top: TopLogprobs | None) -> tuple[Any, ...] | None:
    if top is None:
        return None
    return top.ids.shape[1], top.rows.tobytes(), top.ids.tobytes(), top.values.tobytes(), top.ranks.tobytes()


def _logprobs_from_wire(wire: tuple[Any, ...] | None) -> TopLogprobs | None:
    if wire is None:
        return None
    width, rows, ids, values, ranks = wire
    return TopLogprobs(int32(rows), int32(ids).reshape(-1, width), np.frombuffer(values, np.float32).reshape(-1, width), int32(ranks))


def done_from_result(result: StepResult, scheduler: int, executor: int) -> StepDone:
    return StepDone(
        scheduler, executor, result.step, result.ids.tobytes(), _logprobs_to_wire(result.logprobs),
        _logprobs_to_wire(result.prompt_logprobs), result.error, result.seconds,
    )  # fmt: skip


def result_from_done(done: StepDone) -> StepResult:
    return StepResult(
        done.step, int32(done.ids), _logprobs_from_wire(done.logprobs), _logprobs_from_wire(done.prompt_logprobs), done.error, done.seconds
    )


def token_rows(top: TopLogprobs) -> list[list[Any]]:
    """Log-probabilities as clients get them: for each row `[id, logprob, rank, [[id, logprob], ...]]`, likeliest first."""
    return [
        [ids[0], values[0], rank, [list(pair) for pair in zip(ids[1:], values[1:], strict=True)]]
        for ids, values, rank in zip(top.ids.tolist(), top.values.tolist(), top.ranks.tolist(), strict=True)
    ]
