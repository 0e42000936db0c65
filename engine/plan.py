"""What one step of the model does, and what comes back: columns, not rows, because there are hundreds of rows a step.

A plan is a delta. The executor keeps a state for each *slot* (block table, position, last token, sampler), so a decode row is one
slot number: its input token may not even exist on the host yet, since plan N+1 is sent before the results of N are back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from penstock.engine.request import Sampler

MOST_AHEAD = 2  # plans that are sent before the results of earlier ones are back
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A slot gets a new occupant. `history` is every known token of it (prompt and generated), int32, of which `prompt_tokens` are
    the prompt: the executor rebuilds penalty counts and the bad-words tail from it, and reads from it which prompt token follows a
    chunk when prompt logprobs are wanted. Sent only where the sampler needs it, else empty. `pages` hold its adapter; none: the base
    model."""

    slot: int
    prompt_tokens: int
    sampler: Sampler
    history: Int32
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step. Rows `[0, decodes)` are decodes of one token each, whose input is the slot's last sampled token, on the device. The
    rows after them are prefill chunks whose ids are in `tokens`, one after another."""

    step: int
    fills: tuple[Fill, ...]
    # Block table writes, applied before the step: table[table_slots[i], table_columns[i]] = table_blocks[i].
    table_slots: Int32
    table_columns: Int32
    table_blocks: Int32
    slots: Int32  # [rows] which slot each row belongs to; a slot appears at most once
    starts: Int32  # [rows] position of the row's first query token = tokens of it already in the KV cache
    counts: Int32  # [rows] query tokens; 1 for a decode
    decodes: int
    samples: npt.NDArray[np.bool_]  # [rows] whether the row's last token yields a new token; true for every decode
    tokens: Int32  # [sum(counts[decodes:])] input ids of the prefill rows

    @property
    def query_tokens(self) -> int:
        return self.decodes + len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """Log-probabilities of raw logits (before penalties, bias and temperature), for rows that asked; column 0 is the chosen token."""

    rows: Int32  # [asked] index into the plan's sampling rows, or for prompts into its rows
    ids: Int32  # [asked, 1 + k]
    values: Float32  # [asked, 1 + k]
    ranks: Int32  # [asked] rank of the chosen token, 1 is the likeliest


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """The sampled ids of one step, in the order of the plan's rows with `samples` set. `error` names what went wrong if the whole
    step failed; then `ids` is empty."""

    step: int
    ids: Int32
    logprobs: TopLogprobs | None = None
    prompt_logprobs: TopLogprobs | None = None  # `rows` repeats a row for each of its prompt tokens
    error: str | None = None
    seconds: float = 0.0  # time spent on the step by the executor
    device_seconds: float | None = None  # that the device ran it, if that is measured
    idle_seconds: float = 0.0  # for which the device had no step before it, likewise


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step, and return what it sampled."""


class StepRunner(Protocol):
    """What runs plans, in the order they are given: a model on a device, or a mock."""

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; return before it is done if the device allows it."""

    def prepare(self) -> bool:
        """While there is no step: do a little of what later ones would have to wait for. Returns whether there is more of it."""

    def load(self, path: str, pages: Sequence[int], told: Callable[[str | None], None]) -> None:
        """Put the adapter in a file (`engine.lora.store`) into these pages, which no later plan reads before `told` was called, on another
        thread perhaps: with None, or with what went wrong."""

    def figures(self) -> dict[str, int]:
        """What it has counted."""

    def close(self) -> None:
        """No more is loaded."""
