"""A step that is running, or done: what comes of it when it is waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engine.plan import Int32, StepResult, TopLogprobs
from penstock.engine.spans import Span
from penstock.engine.staging import Returned


class CannotRecord(RuntimeError):
    """A step cannot be recorded as a CUDA graph. It has not been run. `lasting`: nor can others."""

    def __init__(self, text: str, *, lasting: bool) -> None:
        super().__init__(text)
        self.lasting = lasting


NO_IDS: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step that is running, or done: `engine.plan.Pending`. `places[i]` is where the plan's i-th sampled row is among the ids."""

    step: int
    started: float
    places: Int32
    returned: Returned | None
    logprob_rows: Int32 | None = None
    prompt_rows: Int32 | None = None
    error: str | None = None
    span: Span | None = None

    def result(self) -> StepResult:
        """Wait for the step, and return what it sampled."""
        try:
            got = {name: tensor.numpy() for name, tensor in self.returned.wait().items()} if self.returned is not None else None
            ran, idle = (None, 0.0) if self.span is None else self.span.read()
        except RuntimeError as error:
            return self._failed(str(error))
        if got is None:
            return self._failed(self.error or "the step failed")
        ids = got["ids"].astype(np.int32)[self.places]
        logprobs = prompts = None
        if self.logprob_rows is not None:
            order = np.argsort(self.places)[self.logprob_rows]  # from the order on the device to the plan's
            logprobs = _top(got, "logprobs", order.astype(np.int32))
        if self.prompt_rows is not None:
            prompts = _top(got, "prompts", self.prompt_rows)
        return StepResult(self.step, ids, logprobs, prompts, None, time.perf_counter() - self.started, ran, idle)

    def _failed(self, error: str) -> StepResult:
        return StepResult(self.step, NO_IDS, error=error, seconds=time.perf_counter() - self.started)


def _top(got: dict[str, npt.NDArray[Any]], kind: str, rows: Int32) -> TopLogprobs:
    ids, values, ranks = (got[f"{kind}.{name}"] for name in ("ids", "values", "ranks"))
    return TopLogprobs(rows, ids.astype(np.int32), values.astype(np.float32), ranks.astype(np.int32))
