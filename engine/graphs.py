"""Decode steps as CUDA graphs: one launch in the place of hundreds.

A graph is captured for a number of rows, when a step first needs it. Rows beyond a step's own fill it up: they belong to a slot that
nobody has, and write no keys. What a step says of its rows are five numbers each, in one pinned buffer and one copy; all else is on the
device already. Forward and sampling are one graph where every row only draws or takes the largest logit. Where a row wants more
(penalties, filters, log-probabilities) the graph ends with the logits, and the sampler goes on from there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.triton import TritonAttention
from penstock.engine.kernels.sample import sample_rows
from penstock.engine.model.base import Model
from penstock.engine.plan import Float32, Int32

Int64 = npt.NDArray[np.int64]
FIELDS = 5  # int64 columns: slot, position, place, key of the noise, temperature
NO_PLACE = -1


def buckets(most: int) -> list[int]:
    """The numbers of rows that graphs are captured for: few enough to capture, and never a third more than a step has."""
    sizes = {*range(1, 5), *range(6, 17, 2), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16), *range(160, most, 32), most}
    return sorted(size for size in sizes if size <= most)


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """The results of a graph on their way to the host: `engine.staging.Returned`."""

    ids: Tensor
    event: torch.cuda.Event

    def wait(self) -> dict[str, Tensor]:
        self.event.synchronize()
        return {"ids": self.ids}


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A captured step. `out` are the ids that it samples, or its logits."""

    replay: Callable[[], None]
    out: Tensor


class DecodeGraphs:
    """The decode steps of a model that is attached to `attention`. `last` int64 `[slots + 1]` are the last tokens of each slot, and of
    the one that nobody has. At most `in_flight` results may be waited for."""

    def __init__(self, model: Model, attention: TritonAttention, last: Tensor, in_flight: int) -> None:
        self.model, self.attention, self.last = model, attention, last
        self.nobody = len(last) - 1
        self.sizes = buckets(self.nobody)
        cells = FIELDS * self.nobody
        self._words = torch.zeros(cells, dtype=torch.int64, device=last.device)
        self._pinned = [torch.zeros(cells, dtype=torch.int64, pin_memory=True) for _ in range(in_flight + 1)]
        self._ids = [torch.zeros(self.nobody, dtype=torch.int64, pin_memory=True) for _ in range(in_flight + 1)]
        self._events = [torch.cuda.Event() for _ in range(in_flight + 1)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()  # one step runs at a time: all may use the same
        self._stream = torch.cuda.Stream(last.device)  # type: ignore[no-untyped-call]

    def run(self, columns: tuple[Int32, Int32, Int32, Int64], temperature: Float32, *, plain: bool) -> Tensor:
        """Launch a step of one token in each of some slots. `columns` are slots, positions, places and keys of the noise, `[rows]` all.
        Returns the ids `[rows]` if `plain`, else the logits `[rows, vocab_size]`; they stay until the next call."""
        rows = len(temperature)
        size = self.sizes[bisect_left(self.sizes, rows)]
        graph = self._graphs.get((size, plain)) or self._capture(size, plain)
        turn = self._turn = (self._turn + 1) % len(self._pinned)
        self._events[turn].synchronize()
        pinned = self._pinned[turn]
        words = pinned.numpy()[: FIELDS * size].reshape(FIELDS, size)
        for column, values, empty in zip(words, columns, (self.nobody, 0, NO_PLACE, 0), strict=False):
            column[:rows] = values
            column[rows:] = empty
        words[4].view(np.float32)[:size] = 0
        words[4].view(np.float32)[:rows] = temperature
        self._words[: FIELDS * size].copy_(pinned[: FIELDS * size], non_blocking=True)
        graph.replay()
        return graph.out[:rows]

    def give(self, ids: Tensor) -> Replayed:
        """Send the ids of the step that was launched last to the host."""
        there, event = self._ids[self._turn][: len(ids)], self._events[self._turn]
        there.copy_(ids, non_blocking=True)
        event.record()
        return Replayed(there, event)

    def _capture(self, size: int, plain: bool) -> Graph:
        """Run the step once, which compiles what must be compiled, and then record it. Raises `RuntimeError` if it cannot be recorded."""
        words = self._words[: FIELDS * size].view(FIELDS, size)
        slots, positions, places, keys = words[:4]
        temperature = words[4].view(torch.float32)[:size]

        def step() -> Tensor:
            self.attention.begin_decodes(slots, positions, places, size, self.attention.longest)
            logits = self.model.forward(self.last.index_select(0, slots), positions, None)
            return sample_rows(logits, temperature, keys, self.last, slots) if plain else logits

        for column, empty in zip(words, (self.nobody, 0, NO_PLACE, 0, 0), strict=True):
            column.fill_(empty)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
            # Other threads go on meanwhile: they wait for the events of earlier steps.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                out = step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        captured = self._graphs[size, plain] = Graph(graph.replay, out)
        return captured
