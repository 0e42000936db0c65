"""What LoRA adapters add to a product begins with x @ A.T: for each job of a step (`engine.kernels.tiles`) the rows of x that are its
tile's times the rows of A in its page, in float32.

The inner dimension is cut into SPLITS parts, whose sums lie apart: expand adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import fetch, overlap, wait
from penstock.engine.kernels.tiles import SMALL, Tiles, registers_for
from penstock.engine.lora.layout import RANKS, PagePool, Place


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


def programs_of(rows: int) -> int:
    """How many stay on a multiprocessor at once."""
    return 8 if rows == SMALL else 3


def shrink_rows(x: Tensor, pool: PagePool, place: Place, step: Tiles, processors: int, *, early: bool = True) -> int:
    """Write what A makes of x `[tokens, in]` to `step.sums`, for the tokens that are in `step`. Returns how many splits there are to sum.

    x and the pages are of one dtype: float32, float16 or bfloat16; the numbers of a row of x lie side by side. `processors`: how many
    multiprocessors share the work. `early`: see `overlap`.
    """
    data, used, cut, slices = pool.data, pool.used, step.cut, len(place.group)
    split, programs = split_for(place.in_features, cut.rows, x.dtype), programs_of(cut.rows)
    taken = 1 if cut.rows == SMALL else slices
    items, line = cut.jobs * split.count * (slices // taken), 128 // x.itemsize
    _shrink[(min(items, processors * programs),)](
        x, data, used, step.tokens, step.jobs, step.tiles, step.sums, x.stride(0), data.stride(0), place.a, place.in_features, split.share,
        place.site, used.stride(0),
        SLICES=slices, TAKEN=taken, SPLITS=split.count, RANKS=RANKS, ROWS=cut.rows, PADDED=triton.next_power_of_2(taken * RANKS),
        DEPTH=split.depth, LINE=line, LINES=min(16, triton.next_power_of_2(triton.cdiv(split.share, line))), STAGES=4,
        num_warps=4, maxnreg=registers_for(4 * programs), **overlap(x, early=early),
    )  # fmt: skip
    return split.count
