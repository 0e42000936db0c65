"""A runner without a model: it answers every plan at once, so that everything else can be measured and broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.engine.plan import StepPlan, StepResult

PACED = 16  # tokens


@dataclass(frozen=True, slots=True)
class MockPending:
    """A step that is done already, or will be `seconds` after it is asked for."""

    answer: StepResult
    seconds: float = 0.0

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        if self.seconds:
            time.sleep(self.seconds)
        return self.answer


class MockRunner:
    """Stands in for `engine.runner.Runner`: same calls, no model, no torch, no log-probabilities.

    Its token is a hash of the request's seed, the absolute position and the token before, in `[first, first + span)`, whatever the slot,
    the batch or the attempt. So a stream that was interrupted and handed over again equals the undisturbed one, as it does with a model,
    and one that got a wrong token, seed or place goes another way for good. A greedy request has no seed. A step takes `pace` seconds and,
    once more, for every `PACED` tokens in it: a device that is neither loaded nor noisy. Raises `ValueError` for a span that is not in
    the vocabulary.
    """

    def __init__(self, vocab_size: int, first: int = 0, span: int | None = None, pace: float = 0.0) -> None:
        self.pace = pace
        self.first, self.span = first, vocab_size - first if span is None else span
        if not 0 <= first < vocab_size or not 0 < self.span <= vocab_size - first:
            raise ValueError(f"first={first}, span={self.span}: must lie within the vocabulary of {vocab_size} tokens")
        self._seeds = np.zeros(256, np.int64)  # of each slot
        self._last = np.zeros(256, np.int64)  # token that each slot sampled last

    def launch(self, plan: StepPlan) -> MockPending:
        """Answer one id for each row of `plan` that samples."""
        for fill in plan.fills:
            if fill.slot >= len(self._seeds):
                more = np.zeros(fill.slot + 1, np.int64)
                self._seeds, self._last = np.concatenate([self._seeds, more]), np.concatenate([self._last, more])
            self._seeds[fill.slot] = fill.sampler.seed if fill.sampler.temperature > 0 else -1
        before = self._last[plan.slots]
        before[plan.decodes :] = plan.tokens[np.cumsum(plan.counts[plan.decodes :]) - 1]
        slots, positions = plan.slots[plan.samples], (plan.starts + plan.counts)[plan.samples]
        ids = self.first + (_mix(self._seeds[slots], positions, before[plan.samples]) % np.uint64(self.span)).astype(np.int32)
        self._last[slots] = ids
        seconds = self.pace * (1 + plan.query_tokens / PACED)
        return MockPending(StepResult(step=plan.step, ids=ids, seconds=seconds), seconds)

    def prepare(self) -> bool:
        return False

    def load(self, path: str, pages: Sequence[int], told: Callable[[str | None], None]) -> None:
        told(f"{path}: a mock has no adapters")

    def figures(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def _mix(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A number for each row, from all three. In 64 bits, modulo their size."""
    x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(30)) ^ tokens.astype(np.uint64)) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
