"""Steps as CUDA graphs: one launch in the place of hundreds.

A graph is captured for a `Size`, when a step first needs it or before, when there is none. What a step has less than that is filled up:
rows of a slot that nobody has, tokens that write no keys, tiles of no row. So the columns of a step (`engine.runner`), filled up, are all
that a graph reads; they lie in one pinned buffer, and go to the device in one copy. Forward and sampling are one graph where every row only
draws or takes the largest logit. Where a row wants more (penalties, filters, log-probabilities) the graph ends with the logits, and the
sampler goes on from there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns
from penstock.engine.attention.prompt import LONG
from penstock.engine.attention.triton import TritonAttention
from penstock.engine.kernels.sample import sample_rows
from penstock.engine.kernels.tiles import LARGE, SMALL, TOGETHER, Cut
from penstock.engine.lora.triton import TritonAdapters, room_for
from penstock.engine.model.base import Model, run_model
from penstock.engine.results import CannotRecord
from penstock.engine.sizes import Mix, Size, beginnings, close, coarse, likely, samples_of

Int64 = npt.NDArray[np.int64]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Where the words of a step are put, which are also `cells`, and its ids come back. `event` is that of the ids; a CPU needs none."""

    words: Tensor
    cells: Int64
    ids: Tensor
    event: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """The results of a graph on their way to the host: `engine.staging.Returned`."""

    ids: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> dict[str, Tensor]:
        if self.event is not None:
            self.event.synchronize()
        return {"ids": self.ids}


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A step that can be run again. `columns` are where its columns begin among its words, how long they are, and what they are filled up
    with. `out` are the ids that it samples, or its logits."""

    columns: dict[str, tuple[int, int, int]]
    words: int
    replay: Callable[[], object]
    out: Tensor


class StepGraphs:
    """The steps of a model that is attached to `attention`, of up to `most` tokens. `last` int64 `[slots + 1]` are the last tokens of each
    slot, and of the one that nobody has. At most `in_flight` results may be waited for."""

    def __init__(
        self, model: Model, attention: TritonAttention, last: Tensor, most: int, in_flight: int, record: Record | None = None,
        adapters: TritonAdapters | None = None,
    ) -> None:  # fmt: skip
        self.model, self.attention, self.last, self.adapters = model, attention, last, adapters
        self.record = CudaRecord(last.device) if record is None else record
        self.nobody = len(last) - 1
        self.rows = close(self.nobody)
        self.tokens = coarse(max(most, self.nobody))
        mix = None if adapters is None else Mix(SMALL, TOGETHER)
        largest = Size(self.tokens[-1], self.nobody, chunks=True, plain=True, mix=mix)
        cells = words_of(self._columns(largest))
        self._words = torch.zeros(cells, dtype=torch.int64, device=last.device)
        on_cuda = last.device.type == "cuda"
        self._turns = [
            Turn(
                words, words.numpy(), torch.zeros(self.nobody, dtype=torch.int64, pin_memory=on_cuda),
                torch.cuda.Event() if on_cuda else None,  # type: ignore[no-untyped-call]
            )
            for words in (torch.zeros(cells, dtype=torch.int64, pin_memory=on_cuda) for _ in range(in_flight + 1))
        ]  # fmt: skip
        self._turn = self._turns[0]
        self._graphs: dict[Size, Graph] = {}
        self._mixes: dict[Mix, None] = {}  # that steps had, in order
        cuts = () if adapters is None else (SMALL, LARGE) if adapters.rows is None else (adapters.rows,)
        self._possible = [Mix(cut, pages) for cut in cuts for pages in (1, TOGETHER)]
        self._unfit: set[Size] = set()  # there was no memory for them, and then none is captured before it is asked for
        self._longest = LONG if attention.suits_prompt else None  # tokens of a prompt that may be a step by itself
        self._logits: Tensor | None = None  # of a step that ends with them: one place for all graphs

    def find(self, columns: Columns, *, plain: bool, adapted: bool = False) -> Size | None:
        """The size at which a step is to be run here, if it is; `adapted`: as the adapters prepared it. What takes long to capture, long
        prompts by themselves, is only there if it was prepared."""
        tokens, samples, chunks = len(columns["positions"]), len(columns["sample_slots"]), "tokens" in columns
        sizes = self.tokens if chunks else self.rows
        at = bisect_left(sizes, tokens)
        if at == len(sizes):
            return None
        mix = self._mix() if adapted else None
        if adapted and mix is None:
            return None
        samples = samples_of(samples, sizes[at], self.nobody) if chunks else sizes[at]
        size = Size(sizes[at], samples, chunks, plain, mix)
        if self.attention.prompt and (prompt := replace(size, prompt=True)) in self._graphs:
            return prompt
        return None if size in self._unfit else size

    def run(self, size: Size, columns: Columns, begin: Callable[[], None] | None = None) -> Tensor:
        """Launch a step; `begin` is called when its columns are on their way. Returns the ids `[samples]` if it is `plain`, else the
        logits `[samples, vocab_size]`; they stay until the next call. Raises `CannotRecord`."""
        graph = self._graphs.get(size) or self._capture(size)
        turn = self._turn = self._turns.pop(0)
        self._turns.append(turn)
        if turn.event is not None:
            turn.event.synchronize()
        fill_up(turn.cells, graph.columns, columns)
        self._words[: graph.words].copy_(turn.words[: graph.words], non_blocking=True)
        if turn.event is not None:
            turn.event.record()
        if begin is not None:
            begin()
        graph.replay()
        return graph.out[: len(columns["sample_slots"])]

    def prepare(self) -> bool:
        """Capture one of the graphs that steps are likely to need. Returns whether there are more. Raises `CannotRecord`."""
        if self._unfit:
            return False
        sizes = chain(
            likely(self.rows, self.tokens, (None, *self._mixes), self._longest),
            *(beginnings(self.rows, self.tokens, mix) for mix in self._possible),  # or the first of a kind would hold everybody up
        )  # fmt: skip
        missing = [size for size in dict.fromkeys(sizes) if size not in self._graphs]
        for size in missing[:1]:
            self._capture(size)
        return len(missing) > 1

    def give(self, ids: Tensor) -> Replayed:
        """Send the ids of the step that was launched last to the host."""
        there, event = self._turn.ids[: len(ids)], self._turn.event
        there.copy_(ids, non_blocking=True)
        if event is not None:
            event.record()
        return Replayed(there, event)

    def _mix(self) -> Mix | None:
        """Of the step that the adapters prepared last; None if one of them has more pages than graphs have room for."""
        if self.adapters is None:
            return None
        cuts = [cut for cut in (self.adapters.whole, self.adapters.sampled) if cut is not None]
        pages = max(cut.pages for cut in cuts)
        if pages > TOGETHER:
            return None
        mix = Mix(cuts[0].rows, 1 if pages == 1 else TOGETHER)
        self._mixes[mix] = None
        return mix

    def _cuts(self, size: Size, mix: Mix) -> tuple[Cut, Cut | None]:
        """Room for any step of this size."""
        sampled = room_for(size.samples, SMALL, self.nobody, mix.pages) if size.chunks else None
        return room_for(size.tokens, mix.rows, self.nobody, mix.pages), sampled

    def _columns(self, size: Size) -> dict[str, tuple[int, int, int]]:
        lengths = {"sources": (size.tokens, self.nobody), "positions": (size.tokens, 0), "decodes": (1, 0)}
        lengths |= {"draw.keys": (size.samples, 0), "draw.temperature": (size.samples, 0), "sample_slots": (size.samples, self.nobody)}
        if size.chunks:
            lengths |= {"tokens": (size.tokens, 0), "sample_tokens": (size.samples, 0)}
        lengths |= self.attention.lengths(size.tokens, self.nobody, chunks=size.chunks)
        if size.mix is not None and self.adapters is not None:
            lengths |= self.adapters.lengths(*self._cuts(size, size.mix))
        places, end = {}, 0
        for name, (length, empty) in lengths.items():
            places[name] = (end, length, empty)
            end += length + length % 2  # addresses are multiples of 16 bytes: Triton compiles another kernel for those that are not
        return places

    def _capture(self, size: Size) -> Graph:
        """Raises `CannotRecord`."""
        columns = self._columns(size)
        # Whoever runs it to record it runs a step of nobody.
        sent = {name: self._words[at : at + length].fill_(empty) for name, (at, length, empty) in columns.items()}
        temperature = sent["draw.temperature"].view(torch.float32)[: size.samples]

        def step() -> Tensor:
            self.attention.begin_sized(sent, min(self.nobody, size.tokens), self.attention.longest, prompt=size.prompt)
            if size.mix is None or self.adapters is None:
                logits = run_model(self.model, self.last, sent)
            else:
                self.adapters.begin_sized(sent, *self._cuts(size, size.mix))
                try:
                    logits = run_model(self.model, self.last, sent)
                finally:
                    self.adapters.end()
            if size.plain:
                return sample_rows(logits, temperature, sent["draw.keys"], self.last, sent["sample_slots"])
            if self._logits is None:
                self._logits = logits.new_empty((self.nobody, logits.shape[1]))
            return self._logits[: size.samples].copy_(logits)

        try:
            replay, out = self.record(step)
        except Exception as error:  # Triton's errors have no base but this; what a step cannot bear, it says when it is run by itself
            if size.prompt:
                self._longest = None  # long prompts can do without
                raise CannotRecord(f"{size} cannot be recorded: {error}", lasting=False) from error
            if for_want_of_memory(error):
                self._unfit.add(size)
                raise CannotRecord(f"no memory to record {size}: {error}", lasting=False) from error
            raise CannotRecord(f"{size} cannot be recorded: {type(error).__name__}: {error}", lasting=True) from error
        graph = self._graphs[size] = Graph(columns, words_of(columns), replay, out)
        return graph


class CudaRecord:
    """Records a step without running it: the device goes on with the steps before. As one step runs at a time, all use the same memory. A
    kernel keeps the priority of the stream that it was recorded in: those of branches beside it wait for room."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """What launches it, and where its output lies then. Raises what the step does, and `RuntimeError`."""
        try:
            return self._record(step)
        except RuntimeError as error:
            if not for_want_of_memory(error):
                raise
        torch.cuda.empty_cache()  # of what steps left that were not recorded: a graph has memory of its own, and cannot ask for theirs
        return self._record(step)

    def _record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # What was never compiled is, and loaded, which no other mode allows.
            graph.capture_begin(pool=self._memory, capture_error_mode="relaxed")
            try:
                out = step()
            except BaseException:
                with suppress(RuntimeError):  # what the step says is what was wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay, out


def for_want_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)  # the driver's own has another type


def words_of(columns: Mapping[str, tuple[int, int, int]]) -> int:
    return max(at + length + length % 2 for at, length, _ in columns.values())


def fill_up(words: np.ndarray, places: Mapping[str, tuple[int, int, int]], columns: Columns) -> None:
    """Write columns to their places in int64 words, and what they are filled up with behind them. float32 keeps its bits."""
    for name, (at, length, empty) in places.items():
        column = columns.get(name)
        have = 0 if column is None else len(column)
        if column is None or have < length:
            words[at : at + length] = empty
        if column is not None:
            room = words[at : at + length]
            (room.view(np.float32) if column.dtype == np.float32 else room)[:have] = column
