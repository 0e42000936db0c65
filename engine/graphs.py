"""Steps as CUDA graphs: one launch in the place of hundreds.

A graph is captured for a `Size`, when a step first needs it. What a step has less than that is filled up: rows of a slot that nobody has,
tokens that write no keys, tiles of no row. So the columns of a step (`engine.runner`), filled up, are all that a graph reads; they lie in
one pinned buffer, and go to the device in one copy. Forward and sampling are one graph where every row only draws or takes the largest
logit. Where a row wants more (penalties, filters, log-probabilities) the graph ends with the logits, and the sampler goes on from there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns
from penstock.engine.attention.triton import TritonAttention
from penstock.engine.kernels.sample import sample_rows
from penstock.engine.kernels.tiles import SMALL, TOGETHER, Cut
from penstock.engine.lora.triton import TritonAdapters, room_for
from penstock.engine.model.base import Model, run_model
from penstock.engine.results import CannotRecord

FINE = 11  # from 2 to this power on, sizes of mixed steps are a sixteenth apart
FEW_SAMPLES = 16  # of a step with chunks: logits of as many as there can be take time


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of a step: tiles of `rows` tokens (`engine.kernels.tiles`), and up to `pages` pages for each."""

    rows: int
    pages: int


@dataclass(frozen=True, slots=True)
class Size:
    """How much a graph has room for. Without `chunks` there is a decode for each token, and every token is sampled. Without a `mix` all
    tokens are the base model's, and adapters cost nothing. `prompt`: the chunk is one alone, a long prompt from its beginning."""

    tokens: int
    samples: int
    chunks: bool
    plain: bool
    mix: Mix | None = None
    prompt: bool = False


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


Int64 = npt.NDArray[np.int64]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


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
        self.rows = sizes(self.nobody)
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
        self._seen: Counter[Size] = Counter()
        self._mixes: dict[Mix, None] = {}  # that steps had, in order
        self._unfit: set[Size] = set()  # there was no memory for them, and then none is captured before it is asked for
        self._logits: Tensor | None = None  # of a step that ends with them: one place for all graphs

    def find(self, columns: Columns, *, plain: bool, adapted: bool = False) -> Size | None:
        """The size at which a step is to be run here, if it is; `adapted`: as the adapters prepared it. Capturing takes longer than a step
        by itself: what is not decodes alone is captured when it comes the second time."""
        tokens, samples, chunks = len(columns["positions"]), len(columns["sample_slots"]), "tokens" in columns
        sizes = self.tokens if chunks else self.rows
        at = bisect_left(sizes, tokens)
        if at == len(sizes):
            return None
        mix = self._mix() if adapted else None
        if adapted and mix is None:
            return None
        samples = self._samples(samples, sizes[at]) if chunks else sizes[at]
        size = Size(sizes[at], samples, chunks, plain, mix, chunks and self.attention.prompt)
        if size in self._graphs:
            return size
        self._seen[size] += 1
        return size if (not chunks or self._seen[size] > 1) and size not in self._unfit else None

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
        """Capture one of the graphs that steps are likely to need. Returns whether there are more. Raises `CannotRecord`.

        The largest first: they share one memory, and what one leaves is used by another only if that needs no more.
        """
        if self._unfit:
            return False
        missing: list[Size] = []
        for mix in (None, *self._mixes):
            decodes = [Size(rows, rows, chunks=False, plain=True, mix=mix) for rows in reversed(self.rows)]
            mixed = [
                Size(tokens, self._samples(samples, tokens), chunks=True, plain=True, mix=mix)
                for samples in (self.nobody, 1)
                for tokens in reversed(self.tokens)
            ]
            missing += [size for size in (mixed[0], *decodes, *mixed[1:]) if size not in self._graphs]
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

    def _samples(self, samples: int, tokens: int) -> int:
        """Of a step with chunks: few, or as many as there can be."""
        most = min(self.nobody, tokens)
        return min(FEW_SAMPLES, most) if samples <= FEW_SAMPLES else most

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
        empty = np.zeros(len(self._words), np.int64)
        fill_up(empty, columns, {})
        self._words.copy_(torch.from_numpy(empty))
        sent = {name: self._words[at : at + length] for name, (at, length, _) in columns.items()}
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
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):  # the driver's own has another type
                self._unfit.add(size)
                raise CannotRecord(f"no memory to record {size}: {error}", lasting=False) from error
            raise CannotRecord(f"{size} cannot be recorded: {type(error).__name__}: {error}", lasting=True) from error
        graph = self._graphs[size] = Graph(columns, words_of(columns), replay, out)
        return graph


class CudaRecord:
    """Runs a step once, which compiles what must be compiled, and then records it. As one step runs at a time, all use the same memory.
    A kernel keeps the priority of the stream that it was recorded in: those of branches beside it wait for room."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                step()
                torch.cuda.empty_cache()  # what it took: a graph has memory of its own, and cannot ask for this while it is recorded
                # Other threads go on meanwhile: they wait for the events of earlier steps.
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    out = step()
                finally:
                    graph.capture_end()
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, out


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


def coarse(most: int) -> list[int]:
    """Numbers of tokens that mixed steps are captured for: a third apart while they are few, an eighth and then a sixteenth from where
    their products take longer the more they are."""
    found = {most, *(size for power in range(4, 9) for size in (2**power, 3 * 2**power // 2))}
    for power in range(9, most.bit_length()):
        parts = 8 if power < FINE else 16
        found |= {2**power * part // parts for part in range(parts, 2 * parts)}
    return sorted(size for size in found if size <= most)


def sizes(most: int) -> list[int]:
    """Numbers of rows that graphs are captured for: few enough to capture, and hardly a quarter more than a step has."""
    found, size = {most}, 1
    while size < most:
        found.add(size)
        size += max(1, 2 ** (size.bit_length() - 3))
    return sorted(found)
