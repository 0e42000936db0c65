"""A product whose bits do not depend on how many rows it has (He et al., "Defeating Nondeterminism in LLM Inference", 2025).

A library chooses its kernel, and with that the order of its sums, by the number of rows. Here a weight has one tile, whatever is multiplied
with it: the same instructions go through the inner dimension in the same order, and no other program takes part in a sum. What lies in
the other rows of a tile changes nothing, since each row of a matrix instruction is a sum of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import overlap, wait

GROUP = 8  # tiles of rows that go through the weight together, so that it is read from the cache
WIDE = 8192  # outputs from which there are tiles enough for a whole device, however few rows there are


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, bias, out, rows, outer, inner, x_row,
    ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the result. WHOLE: the inner dimension is a multiple of INNER."""
    row_tiles, outer_tiles = tl.cdiv(rows, ROWS), tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    first = program // (GROUP * outer_tiles) * GROUP
    group = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * outer_tiles)
    m = (first + within % group) * ROWS + tl.arange(0, ROWS)
    n = within // group * OUTER + tl.arange(0, OUTER)
    k = tl.arange(0, INNER)
    # What is beyond the last row or output is the last one again, so that loads need no masks: it is not stored.
    a_at = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_row + k[None, :]
    b_at = weight + tl.minimum(n, outer - 1).to(tl.int64)[None, :] * inner + k[:, None]
    wait(OVERLAP)
    acc = tl.zeros([ROWS, OUTER], tl.float32)
    for low in range(0, inner, INNER):
        if WHOLE:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            inside = k < inner - low
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            b = tl.load(b_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += INNER
        b_at += INNER
    if BIAS:
        acc += tl.load(bias + tl.minimum(n, outer - 1)).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * outer + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outer)[None, :])


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program takes of the result, how far it goes at a time, and how it is compiled."""

    rows: int
    outer: int
    inner: int
    warps: int
    stages: int


def tile_for(outer: int, dtype: torch.dtype) -> Tile:
    """By the weight alone. A warp group's matrix instruction takes 64 rows, so fewer would save nothing; the narrower tile gives a
    decode twice the programs where a weight has few outputs, and costs a long prefill some of its speed."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    return Tile(64, 128, 64, 4, 4) if outer >= WIDE else Tile(64, 64, 64, 4, 5)


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, rounded once: a row's bits depend on that row alone.

    x `[rows, in]`, the numbers of a row side by side; weight `[out, in]`, contiguous; bias `[out]`; all float32, float16 or bfloat16, sums
    in float32. Returns `[rows, out]`.
    """
    rows, inner = x.shape
    outer = weight.shape[0]
    out = torch.empty((rows, outer), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    tile = tile_for(outer, x.dtype)
    _multiply[(triton.cdiv(rows, tile.rows) * triton.cdiv(outer, tile.outer),)](
        x, weight, x if bias is None else bias, out, rows, outer, inner, x.stride(0),
        ROWS=tile.rows, OUTER=tile.outer, INNER=tile.inner, WHOLE=inner % tile.inner == 0, GROUP=GROUP, BIAS=bias is not None,
        num_warps=tile.warps, num_stages=tile.stages, **overlap(x),
    )  # fmt: skip
    return out
