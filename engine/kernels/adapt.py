"""What LoRA adapters add to a product, for any mix of adapters and ranks in two launches: *shrink* multiplies rows of x with A, *expand*
multiplies that with B and adds it to y.

Tokens are sorted by adapter and cut into *tiles* of one adapter; a tile and one page of its adapter is a *job*. Rows of a tile are found
by index, and tokens of the base model are in no tile. How many tiles and jobs there are is read on the device, and the programs, as many as
stay on it at once, share out what there is: a launch fits any step that its columns have room for, and a CUDA graph too.

A decode is bound by the bytes of A and B, each read once where an adapter has one tile, and by the two launches where there are few
adapters. So both must be many programs however few the tiles are. Shrink cuts the inner dimension into SPLITS parts, whose sums it writes
in float32. Expand cuts the outputs into blocks, of which a program takes a row of neighbours: it sums up the parts once, and has the next
block of B on its way. Rows of A and B that a page does not use are not read, and what no page of a tile changes of y is not touched. With
programmatic dependent launch all that says what to do is read, and the first of A and B fetched, while the kernel before still runs.

Nothing is added atomically, and how the inner dimension is cut depends on the product and on the size of the tiles alone: for one size of
tiles, a token's bits do not depend on the others of its step.

Segments of an adapter's tokens are Punica's (SGMV, Chen et al., MLSys 2024), pages of ranks are S-LoRA's (Sheng et al., MLSys 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import fetch, overlap, wait
from penstock.engine.lora.layout import RANKS, PagePool, Place

SMALL, LARGE = 16, 64  # tokens of a tile: what a tensor core's tile has, and for long segments what a warp group's has
MOST_SLICES = 3
TOGETHER = 4  # pages of an adapter that expand multiplies with in one product, if there is more than one; with more, it takes turns


@triton.jit  # type: ignore[untyped-decorator]
def _of_part(part, first, second, third, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """That of slice `part`."""
    return first if SLICES == 1 else tl.where(part == 0, first, tl.where(part == 1, second, third))


@triton.jit  # type: ignore[untyped-decorator]
def _item(  # type: ignore[no-untyped-def]
    item, there, data, used, tokens, jobs, page_size, a, inner, share, site, sites,
    SLICES: tl.constexpr, TAKEN: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """What an item of shrink is: how many tokens, and which; the addresses of its rows of A, how many the page has of each row's slice, and
    the most of any; from where to where it goes through them; and where its sums go."""
    m = tl.arange(0, ROWS)
    n = tl.arange(0, PADDED)
    split = item % SPLITS
    part = item // SPLITS % (SLICES // TAKEN) * TAKEN
    job = tl.where(there, item // (SPLITS * (SLICES // TAKEN)), 0)  # beyond the last one the first is read, and nothing is done
    page = tl.load(jobs + 3 * job)
    first = tl.load(jobs + 3 * job + 1)
    count = tl.where(there, tl.load(jobs + 3 * job + 2), 0)
    ranks = tl.load(used + page * sites + site + part + n // RANKS, mask=n < TAKEN * RANKS, other=0)
    token = tl.load(tokens + first + m, mask=m < count, other=0)
    rows = data + page * page_size + a + (part * RANKS + n) * inner
    low = split * share
    line = ((job.to(tl.int64) * SLICES + part + n // RANKS) * SPLITS + split) * (ROWS * RANKS) + n % RANKS
    return count, token, rows, ranks, tl.where(there, tl.max(ranks, 0), 0), low, tl.minimum(low + share, inner), line


@triton.jit(do_not_specialize=["site", "sites"])  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    x, data, used, tokens, jobs, tiles, sums, x_row, page_size, a, inner, share, site, sites,
    SLICES: tl.constexpr, TAKEN: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    DEPTH: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """An item: one split of TAKEN slices of one job."""
    m = tl.arange(0, ROWS)
    n = tl.arange(0, PADDED)
    k = tl.arange(0, DEPTH)
    items = tl.load(tiles + 1).to(tl.int32) * (SPLITS * (SLICES // TAKEN))
    begin, step = tl.program_id(0), tl.num_programs(0)
    count, token, rows, ranks, most, low, high, line = _item(
        begin, begin < items, data, used, tokens, jobs, page_size, a, inner, share, site, sites, SLICES, TAKEN, SPLITS, RANKS, ROWS, PADDED
    )  # fmt: skip
    early = low + tl.arange(0, LINES) * LINE
    fetch(rows[:, None] + early[None, :], (n % RANKS < ranks)[:, None] & (early < high)[None, :], OVERLAP)
    wait(OVERLAP)
    for item in range(begin, items, step):
        if most > 0:
            mine = (m < count)[:, None]
            live = (n % RANKS < ranks)[None, :]
            acc = tl.zeros([ROWS, PADDED], tl.float32)
            for at in tl.range(low, high, DEPTH, num_stages=STAGES):
                x_at = x + token[:, None] * x_row + (at + k)[None, :]
                a_at = rows[None, :] + (at + k)[:, None]
                inside = at + k < inner
                these = tl.load(x_at, mask=mine & inside[None, :], other=0.0)
                those = tl.load(a_at, mask=live & inside[:, None], other=0.0)
                acc = tl.dot(these, those, acc, input_precision="ieee")
            # Rows that the page does not use gave zeros. A mask that is the same for all of a slice leaves the stores wide.
            tl.store(sums + line[None, :] + m[:, None] * RANKS, acc, mask=mine & (ranks > 0)[None, :])
        following = item + step
        count, token, rows, ranks, most, low, high, line = _item(
            following, following < items, data, used, tokens, jobs, page_size, a, inner, share, site, sites,
            SLICES, TAKEN, SPLITS, RANKS, ROWS, PADDED,
        )  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Cut:
    """How a step's `tokens` were cut, or how much room there is: `tiles` of `rows` tokens at most, `jobs` of a tile and a page, and
    `pages` of the adapter that has most."""

    tokens: int
    rows: int
    tiles: int
    jobs: int
    pages: int


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The tiles of a step on the device; columns are int64. `tokens` are the adapted ones, those of a tile together. `jobs` has three words
    for each: its page, where its tokens begin in `tokens`, and how many they are. `tiles` begins with how many tiles and how many jobs
    there are, and two words more; then come four for each tile: where its tokens begin, how many they are, its first job, and how many
    jobs it has. `sums` is float32, and at least `cut.jobs * cut.rows * RANKS` long for each split of each slice of a product."""

    tokens: Tensor
    jobs: Tensor
    tiles: Tensor
    sums: Tensor
    cut: Cut


@dataclass(frozen=True, slots=True)
class Split:
    """How shrink goes through its inner dimension: in `count` parts of `share`, a multiple of `depth`, which it goes at a time."""

    count: int
    share: int
    depth: int


@cache
def split_for(inner: int, rows: int, dtype: torch.dtype) -> Split:
    """By the product and the size of tiles alone. Small tiles are for few tokens: then a part is a program, and must be short."""
    depth = 32 if dtype == torch.float32 else 128 if rows == SMALL else 64
    most, least = (8 if inner <= 8192 else 16, 256) if rows == SMALL else (4 if inner <= 8192 else 8, 512)
    share = -(-inner // (min(most, -(-inner // least)) * depth)) * depth
    return Split(-(-inner // share), share, depth)


def programs_of(rows: int, pages: int) -> tuple[int, int]:
    """How many programs of shrink and of expand stay on a multiprocessor at once."""
    return (8, 4 if pages == 1 else 3) if rows == SMALL else (3, 2)


def registers_for(warps: int) -> int:
    """How many registers a thread may have where so many warps are to stay on a multiprocessor: versions of Triton differ in how many they
    would take."""
    return min(2048 // warps // 8 * 8, 255)


def adapt_rows(x: Tensor, y: Tensor, pool: PagePool, place: Place, step: Tiles, processors: int) -> None:
    """Add to y `[tokens, sum(outs)]`, in place, what their adapters make of x `[tokens, in]`, for the tokens that are in `step`.

    x, y and the pages are of one dtype: float32, float16 or bfloat16; in x and y the numbers of a row lie side by side. Sums are in
    float32; what is between A and B is rounded to that dtype, and y once. `processors`: how many multiprocessors share the work.
    """
    data, used, cut, slices = pool.data, pool.used, step.cut, len(place.group)
    split = split_for(place.in_features, cut.rows, x.dtype)
    shrinks, expands = programs_of(cut.rows, cut.pages)
    taken = 1 if cut.rows == SMALL else slices
    items, line = cut.jobs * split.count * (slices // taken), 128 // x.itemsize
    _shrink[(min(items, processors * shrinks),)](
        x, data, used, step.tokens, step.jobs, step.tiles, step.sums, x.stride(0), data.stride(0), place.a, place.in_features, split.share,
        place.site, used.stride(0),
        SLICES=slices, TAKEN=taken, SPLITS=split.count, RANKS=RANKS, ROWS=cut.rows, PADDED=triton.next_power_of_2(taken * RANKS),
        DEPTH=split.depth, LINE=line, LINES=min(16, triton.next_power_of_2(triton.cdiv(split.share, line))), STAGES=4,
        num_warps=4, maxnreg=registers_for(4 * shrinks), **overlap(x),
    )  # fmt: skip
    together, more, none = 1 if cut.pages == 1 else TOGETHER, cut.pages > TOGETHER, (0,) * (MOST_SLICES - slices)
    columns = 64 if x.dtype == torch.float32 or more else 256 if cut.rows == SMALL and together == 1 else 128
    blocks = cut.tiles * sum(triton.cdiv(out, columns) for out in place.outs)
    _expand[(min(blocks, processors * expands),)](
        step.sums, data, used, step.tokens, step.jobs, step.tiles, y, y.stride(0), data.stride(0), *place.b, *none, *place.outs, *none,
        place.site, used.stride(0),
        SLICES=slices, SPLITS=split.count, RANKS=RANKS, ROWS=cut.rows, TOGETHER=together, MORE=more, COLUMNS=columns, LINE=line, STAGES=3,
        num_warps=8 if more else 4, maxnreg=None if more else registers_for(4 * expands), **overlap(x),
    )  # fmt: skip
