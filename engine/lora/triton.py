"""Adapters with the Triton kernels: the production path on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32
from penstock.engine.kernels.expand import expand_rows
from penstock.engine.kernels.few_rows import Begun
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.shrink import shrink_rows, split_for
from penstock.engine.kernels.tiles import LARGE, MOST_SLICES, SMALL, Cut, Tiles
from penstock.engine.lora.base import AdaptedRows, Pages
from penstock.engine.lora.layout import RANKS, PagePool, Place

LONG = 1024  # adapted tokens from which tiles may be large: with fewer, there would be too few of them for a device
FULL = 3  # and so many small tiles they must save for each, or most of a large one would be empty
WHOLE, SAMPLED = "adapted", "adapted.sampled"  # of columns: of all tokens, and of those that go on
Counts = npt.NDArray[np.int64]


class TritonAdapters:
    """An `engine.lora.base.AdapterBackend`, for float32, float16 and bfloat16.

    `rows`: the tokens of a tile, None: chosen for each step. With one size of tiles, a token's bits depend on its own row alone. After
    `prepare`, `whole` and `sampled` are how the step's tokens were cut: all of them, and those of `samples`, None if that is all.

    In a graph shrink runs beside the product, in a stream of its own: it is short, and what it waits for is ready when the product begins.
    """

    joins = True

    def __init__(self, pool: PagePool, *, rows: int | None = None) -> None:
        self._shapes = {(len(place.group), place.in_features) for place in pool.layout.places}
        if any(slices > MOST_SLICES for slices, _ in self._shapes):
            raise ValueError(f"at most {MOST_SLICES} products of one input can be adapted together")
        self.pool, self.rows, self.active = pool, rows, False
        device = pool.data.device
        self.processors = processors_of(device)
        self.whole: Cut = Cut(0, SMALL, 0, 0, 0)
        self.sampled: Cut | None = None
        self.step: Tiles | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._beside: torch.cuda.Stream | None = None  # in which shrink runs in this step
        self._splits: int | None = None  # of what shrink has begun beside the product, 0: it is about to
        self._narrowed: Tiles | None = None

    def prepare(self, rows: AdaptedRows) -> Columns:
        adapters, of_tokens = rows.by_adapter()
        self.whole, columns = cut_tokens(adapters, of_tokens, self.rows, WHOLE)
        self.sampled = None
        if rows.samples is not None:
            self.sampled, more = cut_tokens(adapters, of_tokens[rows.samples], self.rows or SMALL, SAMPLED)
            columns |= more
        return columns

    def lengths(self, whole: Cut, sampled: Cut | None) -> dict[str, tuple[int, int]]:
        """The columns of `prepare` of any step that has no more than this: how long they can be, and what fills them up so that it does
        nothing."""
        return lengths_of(whole, WHOLE) | ({} if sampled is None else lengths_of(sampled, SAMPLED))

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self._enter(columns, self.whole, self.sampled)

    def begin_sized(self, columns: Mapping[str, Tensor], whole: Cut, sampled: Cut | None) -> None:
        """`begin`, for any step of these `rows` and no more of anything else: how much there is of it is read on the device. This is how
        graphs begin: to launch in two streams costs the host more than it saves, but for a graph it is once."""
        self._enter(columns, whole, sampled)
        self._beside = self._stream

    def _enter(self, columns: Mapping[str, Tensor], whole: Cut, sampled: Cut | None) -> None:
        data, cuts = self.pool.data, [whole] if sampled is None else [whole, sampled]
        sums = torch.empty(max(self._room(cut) for cut in cuts), dtype=torch.float32, device=data.device)

        def tiles(cut: Cut, name: str) -> Tiles:
            return Tiles(columns[f"{name}.tokens"], columns[f"{name}.jobs"], columns[f"{name}.tiles"], sums, cut)

        self.active, self.step = True, tiles(whole, WHOLE)
        self._narrowed = self.step if sampled is None else tiles(sampled, SAMPLED)

    def _room(self, cut: Cut) -> int:
        """How many float32 shrink writes at most: what one product's expand has read, the next one's shrink may overwrite."""
        parts = [slices * split_for(inner, cut.rows, self.pool.data.dtype).count for slices, inner in self._shapes]
        return cut.jobs * cut.rows * RANKS * max(parts, default=0)

    def end(self) -> None:
        self._join()  # if a product failed: a graph whose branches do not meet is not even ended
        self.active, self.step, self._narrowed, self._beside = False, None, None, None

    def narrow(self) -> None:
        self.step = self._narrowed

    def ahead(self, place: Place, x: Tensor) -> None:
        step = self._step_of(place, x)
        if step is not None and self._beside is not None:
            self._splits = 0
            self._beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._beside):
                self._splits = self._shrink(place, x, step, early=False)

    def add(self, place: Place, x: Tensor, y: Tensor) -> None:
        step = self._step_of(place, x)
        if step is None:
            return
        if (splits := self._join()) is not None:
            expand_rows(y, self.pool, place, step, splits, self.processors, early=False)
        else:
            expand_rows(y, self.pool, place, step, self._shrink(place, x, step), self.processors)

    def _join(self) -> int | None:
        """Wait for what runs beside the product, if something does. Returns its splits."""
        splits, self._splits = self._splits, None
        if splits is not None and self._beside is not None:
            torch.cuda.current_stream().wait_stream(self._beside)
        return splits

    @property
    def suits_few(self) -> bool:
        """Whether the step's products can begin what this adds: their kernel knows tiles of one size."""
        return self.step is not None and self.step.cut.rows == SMALL

    def fused(self, place: Place, x: Tensor) -> Begun | None:
        """What the product of x `[tokens, in]` is to begin by the way; None: there is nothing to add."""
        step = self._step_of(place, x)
        return None if step is None else Begun(self.pool, place, step)

    def finish(self, place: Place, y: Tensor) -> None:
        """Add to y `[tokens, sum(outs)]` what its product has begun."""
        if (step := self._step_of(place, y)) is not None:
            expand_rows(y, self.pool, place, step, 1, self.processors)

    def _shrink(self, place: Place, x: Tensor, step: Tiles, *, early: bool = True) -> int:
        return shrink_rows(x if x.stride(1) == 1 else x.contiguous(), self.pool, place, step, self.processors, early=early)

    def _step_of(self, place: Place, rows: Tensor) -> Tiles | None:
        """The step of a product with so many rows; None if no adapter is in it."""
        step = self.step
        if step is None or len(rows) != step.cut.tokens:
            raise RuntimeError(f"{place.group[0].name} got {len(rows)} tokens of a step that has {step and step.cut.tokens}")
        return step if step.cut.tiles else None


def room_for(tokens: int, rows: int, slots: int, pages: int) -> Cut:
    """Room for any step of so many tokens, in tiles of `rows`: each slot may have another adapter, of up to so many pages, with one tile
    that is not full."""
    tiles = min(tokens, tokens // rows + slots)
    return Cut(tokens, rows, tiles, tiles * pages, pages)


def lengths_of(cut: Cut, name: str) -> dict[str, tuple[int, int]]:
    return {f"{name}.tokens": (cut.tokens, 0), f"{name}.jobs": (3 * cut.jobs, 0), f"{name}.tiles": (4 + 4 * cut.tiles, 0)}


def cut_tokens(adapters: Sequence[Pages], of_tokens: Int32, rows: int | None, name: str) -> tuple[Cut, Columns]:
    """Cut tokens, each of the adapter with this number or below 0 of none, into tiles of `rows`, None: what suits them. The columns are
    those of `engine.kernels.tiles.Tiles`."""
    counts = np.bincount(of_tokens + 1, minlength=len(adapters) + 1)
    tokens, counts = np.argsort(of_tokens, kind="stable")[counts[0] :], counts[1:]
    rows = rows_for(counts) if rows is None else rows
    tiles_of = -(-counts // rows)
    adapter = np.repeat(np.arange(len(adapters)), tiles_of)
    before = (np.arange(len(adapter)) - firsts_of(tiles_of)[adapter]) * rows  # in the tiles before, of the same adapter
    begins, sizes = firsts_of(counts)[adapter] + before, np.minimum(counts[adapter] - before, rows)
    pages_of, pages = np.array([len(pages) for pages in adapters], np.int64), np.fromiter(chain(*adapters), np.int64)
    jobs_of = pages_of[adapter]
    jobs = firsts_of(jobs_of)
    tile = np.repeat(np.arange(len(adapter)), jobs_of)
    page = pages[firsts_of(pages_of)[adapter[tile]] + np.arange(len(tile)) - jobs[tile]]
    columns: Columns = {
        f"{name}.tokens": tokens,
        f"{name}.jobs": np.stack((page, begins[tile], sizes[tile]), 1).ravel(),
        f"{name}.tiles": np.concatenate(((len(adapter), len(tile), 0, 0), np.stack((begins, sizes, jobs, jobs_of), 1).ravel())),
    }
    return Cut(len(of_tokens), rows, len(adapter), len(tile), int(jobs_of.max(initial=0))), columns


def rows_for(counts: Counts) -> int:
    """How many tokens a tile should have, for so many of each adapter."""
    large = int((-(-counts // LARGE)).sum())
    return LARGE if counts.sum() >= LONG and (-(-counts // SMALL)).sum() >= FULL * large else SMALL


def firsts_of(counts: Counts) -> Counts:
    """Where each of some parts of a list begins."""
    return np.cumsum(counts, dtype=np.int64) - counts
