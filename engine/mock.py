"""A runner without a model: it answers every plan at once, so that everything else can be measured and broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.engine.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class MockPending:
    """A step that is already done."""

    answer: StepResult

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self.answer


class MockRunner:
    """Stands in for `engine.runner.Runner`: same calls, no model, no torch, no log-probabilities.

    The token at absolute position p is `first + p % span`, whatever the slot, the batch or the attempt: a stream that was interrupted and
    handed over again equals the undisturbed one, as it does with a model. Raises `ValueError` for a span that is not in the vocabulary.
    """

    def __init__(self, vocab_size: int, first: int = 0, span: int | None = None) -> None:
        self.first, self.span = first, vocab_size - first if span is None else span
        if not 0 <= first < vocab_size or not 0 < self.span <= vocab_size - first:
            raise ValueError(f"first={first}, span={self.span}: must lie within the vocabulary of {vocab_size} tokens")

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def launch(self, plan: StepPlan) -> MockPending:
        """Answer one id for each row of `plan` that samples."""
        positions = (plan.starts + plan.counts)[plan.samples]
        return MockPending(StepResult(step=plan.step, ids=(self.first + positions % self.span).astype(np.int32)))
