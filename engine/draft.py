"""The next step while it is being put together, and a step that is launched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.engine.plan import Fill, Int32, StepPlan, TopLogprobs
from penstock.engine.request import Tokens
from penstock.engine.slots import Int64, Slots
from penstock.engine.stream import NO_TOKENS, Stream


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A plan whose results are not back: its own row list, because slots may have new occupants by then."""

    step: int
    streams: list[Stream]  # [rows]
    slots: Int32  # [rows]
    stays: Int64  # [rows]
    sampled: Int64  # the rows that sample

    def __str__(self) -> str:
        return f"step {self.step} with {len(self.sampled)} ids"

    def keep_prompts(self, part: TopLogprobs | None) -> None:
        """Streams keep the log-probabilities of prompt chunks until the first token. Those of a prefill that was cut short are
        dropped: it is computed again from its start."""
        if part is None:
            return
        for row in np.unique(part.rows).tolist():
            if not self.streams[row].gone and self.streams[row].stay == self.stays[row]:
                self.streams[row].keep_prompt_part(part, row)


class Draft:
    """What is decided so far: rows, slots to fill, and block table entries. `budget` is the number of tokens that are left to plan.
    No table entry is ever written twice in a step, so the executor may write them in any order."""

    __slots__ = ("_blocks", "_chunk_slots", "_chunks", "_columns", "_decodes", "_fills", "_table_slots", "budget")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._decodes: list[Int64] = []
        self._chunk_slots: list[int] = []
        self._chunks: list[Tokens] = []
        self._fills: list[Fill] = []
        self._table_slots: list[int] = []
        self._columns: list[int] = []
        self._blocks: list[int] = []

    def decode(self, slots: Int64) -> None:
        """One token for each of these slots."""
        self._decodes.append(slots)
        self.budget -= len(slots)

    def chunk(self, slot: int, tokens: Tokens) -> None:
        """The next tokens of a slot's prompt."""
        self._chunk_slots.append(slot)
        self._chunks.append(tokens)
        self.budget -= len(tokens)

    def fill(self, fill: Fill, blocks: list[int]) -> None:
        """A slot gets a new occupant, and its whole block table."""
        self._fills.append(fill)
        self._table_slots += [fill.slot] * len(blocks)
        self._columns += range(len(blocks))
        self._blocks += blocks

    def grow(self, slots: list[int], columns: list[int], blocks: list[int]) -> None:
        """One more block for each of these slots."""
        self._table_slots += slots
        self._columns += columns
        self._blocks += blocks

    def launch(self, step: int, slots: Slots) -> tuple[StepPlan, Launched] | None:
        """The finished plan, now counted as running; None if there is nothing to do."""
        decodes = np.concatenate(self._decodes) if self._decodes else NO_TOKENS
        rows = np.concatenate([decodes, np.array(self._chunk_slots, np.int32)]).astype(np.int32)
        if not len(rows):
            return None
        counts = np.ones(len(rows), np.int32)
        counts[len(decodes) :] = [len(tokens) for tokens in self._chunks]
        tokens = np.concatenate(self._chunks) if self._chunks else NO_TOKENS
        launched = slots.at(rows), rows, slots.stays[rows]
        starts, samples = slots.launch(step, rows, counts)
        table_slots, table_columns = np.array(self._table_slots, np.int32), np.array(self._columns, np.int32)
        plan = StepPlan(
            step, tuple(self._fills), table_slots, table_columns, np.array(self._blocks, np.int32),
            rows, starts, counts, len(decodes), samples, tokens,
        )  # fmt: skip
        return plan, Launched(step, *launched, np.flatnonzero(samples))
