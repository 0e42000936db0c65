"""What LoRA adapters add to a product ends with B: what shrink made of a tile's rows (`engine.kernels.tiles`) times the rows of B in its
pages, added to y.

The outputs are cut into blocks, of which a program takes a row of neighbours: it sums up the splits of shrink once, and has the next block
of B on its way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import fetch, overlap, wait
from penstock.engine.kernels.tiles import MOST_SLICES, SMALL, TOGETHER, Tiles, registers_for
from penstock.engine.lora.layout import RANKS, PagePool, Place


@triton.jit  # type: ignore[untyped-decorator]
def _of_part(part, first, second, third, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """That of slice `part`."""
    return first if SLICES == 1 else tl.where(part == 0, first, tl.where(part == 1, second, third))


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of_b(  # type: ignore[no-untyped-def]
    data, used, jobs, job, pages, page_size, b, out, site, sites, RANKS: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    """The addresses of the rows of B in up to TOGETHER pages from that of `job` on, and how many of them each row's page has."""
    k = tl.arange(0, TOGETHER * RANKS)
    there = k // RANKS < pages
    page = tl.load(jobs + 3 * (job + k // RANKS), mask=there, other=0)
    ranks = tl.load(used + page * sites + site, mask=there, other=0)
    return data + page * page_size + b + (k % RANKS) * out, ranks


@triton.jit  # type: ignore[untyped-decorator]
def _unit(  # type: ignore[no-untyped-def]
    unit, there, data, used, tokens, jobs, tiles, page_size, b_0, b_1, b_2, out_0, out_1, out_2, site, sites,
    SLICES: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A slice of a tile: how many tokens, and which; its first job, and how many it has; and of the first of their pages the rows of B, how
    many each row's page has, and the most of any."""
    m = tl.arange(0, ROWS)
    part = unit % SLICES
    record = tiles + 4 + 4 * tl.where(there, unit // SLICES, 0)
    first = tl.load(record)
    count = tl.where(there, tl.load(record + 1), 0)
    job = tl.load(record + 2)
    pages = tl.where(there, tl.load(record + 3), 0).to(tl.int32)
    token = tl.load(tokens + first + m, mask=m < count, other=0)
    b, out = _of_part(part, b_0, b_1, b_2, SLICES), _of_part(part, out_0, out_1, out_2, SLICES)
    rows, ranks = _rows_of_b(data, used, jobs, job, pages, page_size, b, out, site + part, sites, RANKS, TOGETHER)
    return count, token, job, pages, rows, ranks, tl.max(ranks, 0)  # ranks fill an adapter's pages from the first on


@triton.jit  # type: ignore[untyped-decorator]
def _unit_of(block, blocks, blocks_0, blocks_1, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which slice of which tile a block of outputs is of."""
    unit = block // blocks * SLICES
    if SLICES > 1:
        unit += (block % blocks >= blocks_0).to(tl.int32)
    if SLICES > 2:
        unit += (block % blocks >= blocks_0 + blocks_1).to(tl.int32)
    return unit


@triton.jit  # type: ignore[untyped-decorator]
def _shrunk(  # type: ignore[no-untyped-def]
    sums, job, part, ranks, count, SLICES: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """What shrink made of a tile with these pages, `[ROWS, TOGETHER * RANKS]`, its splits summed in their order."""
    m = tl.arange(0, ROWS)
    k = tl.arange(0, TOGETHER * RANKS)
    line = sums + ((job + k // RANKS) * SLICES + part) * (SPLITS * ROWS * RANKS) + k % RANKS
    inside = (m < count)[:, None] & (ranks > 0)[None, :]
    total = tl.load(line[None, :] + m[:, None] * RANKS, mask=inside, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(line[None, :] + (split * ROWS + m)[:, None] * RANKS, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["site", "sites"])  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    sums, data, used, tokens, jobs, tiles, y, y_row, page_size, b_0, b_1, b_2, out_0, out_1, out_2, site, sites,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, MORE: tl.constexpr,
    COLUMNS: tl.constexpr, LINE: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: some neighbours of all blocks of COLUMNS outputs, which are those of the first slice of the first tile, and so on. MORE:
    there are tiles with more than TOGETHER pages."""
    m = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, TOGETHER * RANKS)
    blocks_0, blocks_1 = tl.cdiv(out_0, COLUMNS), tl.cdiv(out_1, COLUMNS)
    blocks = blocks_0 + blocks_1 + tl.cdiv(out_2, COLUMNS)
    items = tl.load(tiles).to(tl.int32) * blocks
    share = tl.cdiv(items, tl.num_programs(0))
    begin = tl.minimum(tl.program_id(0) * share, items)
    end = tl.minimum(begin + share, items)
    first = _unit_of(begin, blocks, blocks_0, blocks_1, SLICES)
    after = tl.where(begin < end, _unit_of(end - 1, blocks, blocks_0, blocks_1, SLICES) + 1, first)
    count, token, job, pages, rows, ranks, most = _unit(
        first, first < after, data, used, tokens, jobs, tiles, page_size, b_0, b_1, b_2, out_0, out_1, out_2, site, sites,
        SLICES, RANKS, ROWS, TOGETHER,
    )  # fmt: skip
    early = begin % blocks - _of_part(first % SLICES, 0, blocks_0, blocks_0 + blocks_1, SLICES)
    early = early * COLUMNS + tl.arange(0, COLUMNS // LINE) * LINE
    within = early < _of_part(first % SLICES, out_0, out_1, out_2, SLICES)
    fetch(rows[:, None] + early[None, :], (k % RANKS < ranks)[:, None] & within[None, :], OVERLAP)
    wait(OVERLAP)
    for unit in range(first, after):
        part = unit % SLICES
        b, out = _of_part(part, b_0, b_1, b_2, SLICES), _of_part(part, out_0, out_1, out_2, SLICES)
        if most > 0:
            mine = (m < count)[:, None]
            live = (k % RANKS < ranks)[:, None]
            y_rows = y + token * y_row + _of_part(part, 0, out_0, out_0 + out_1, SLICES)
            start = unit // SLICES * blocks + _of_part(part, 0, blocks_0, blocks_0 + blocks_1, SLICES)
            low, high = tl.maximum(begin - start, 0) * COLUMNS, tl.minimum((end - start) * COLUMNS, out)
            h = _shrunk(sums, job, part, ranks, count, SLICES, SPLITS, RANKS, ROWS, TOGETHER).to(data.dtype.element_ty)
            for at in tl.range(low, high, COLUMNS, num_stages=STAGES):
                inside = (at + n < out)[None, :]
                y_at = y_rows[:, None] + (at + n)[None, :]
                old = tl.load(y_at, mask=mine & inside, other=0.0)
                those = tl.load(rows[:, None] + (at + n)[None, :], mask=live & inside, other=0.0)
                add = tl.dot(h, those, input_precision="ieee")
                if MORE:
                    for page in tl.range(TOGETHER, pages, TOGETHER, num_stages=1):
                        other_rows, others = _rows_of_b(
                            data, used, jobs, job + page, pages - page, page_size, b, out, site + part, sites, RANKS, TOGETHER
                        )  # fmt: skip
                        g = _shrunk(sums, job + page, part, others, count, SLICES, SPLITS, RANKS, ROWS, TOGETHER)
                        here = (k % RANKS < others)[:, None] & inside
                        those = tl.load(other_rows[:, None] + (at + n)[None, :], mask=here, other=0.0)
                        add = tl.dot(g.to(data.dtype.element_ty), those, add, input_precision="ieee")
                tl.store(y_at, (old.to(tl.float32) + add).to(y.dtype.element_ty), mask=mine & inside)
        count, token, job, pages, rows, ranks, most = _unit(
            unit + 1, unit + 1 < after, data, used, tokens, jobs, tiles, page_size, b_0, b_1, b_2, out_0, out_1, out_2, site, sites,
            SLICES, RANKS, ROWS, TOGETHER,
        )  # fmt: skip


def programs_of(rows: int, together: int) -> int:
    """How many stay on a multiprocessor at once."""
    return (4 if together == 1 else 3) if rows == SMALL else 2


def expand_rows(y: Tensor, pool: PagePool, place: Place, step: Tiles, splits: int, processors: int, *, early: bool = True) -> None:
    """Add to y `[tokens, sum(outs)]`, in place, what B makes of the `splits` parts of `step.sums`, for the tokens that are in `step`.

    y and the pages are of one dtype: float32, float16 or bfloat16; the numbers of a row of y lie side by side. What is between A and B is
    rounded to that dtype, and y once. `processors`: how many multiprocessors share the work. `early`: see `overlap`.
    """
    data, used, cut, slices = pool.data, pool.used, step.cut, len(place.group)
    together, more, none = 1 if cut.pages == 1 else TOGETHER, cut.pages > TOGETHER, (0,) * (MOST_SLICES - slices)
    columns = 64 if y.dtype == torch.float32 or more else 256 if cut.rows == SMALL and together == 1 else 128
    blocks, programs = cut.tiles * sum(triton.cdiv(out, columns) for out in place.outs), programs_of(cut.rows, together)
    _expand[(min(blocks, processors * programs),)](
        step.sums, data, used, step.tokens, step.jobs, step.tiles, y, y.stride(0), data.stride(0), *place.b, *none, *place.outs, *none,
        place.site, used.stride(0),
        SLICES=slices, SPLITS=splits, RANKS=RANKS, ROWS=cut.rows, TOGETHER=together, MORE=more, COLUMNS=columns, LINE=128 // y.itemsize,
        STAGES=3, num_warps=8 if more else 4, maxnreg=None if more else registers_for(4 * programs), **overlap(y, early=early),
    )  # fmt: skip
