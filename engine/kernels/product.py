"""A product in one tile for any number of rows, and with what comes before and after it in the same launch: a norm of the rows, an
activation and gate, a residual sum.

*Deterministic*: its bits do not depend on how many rows it has (He et al., "Defeating Nondeterminism in LLM Inference", 2025). A library
chooses its kernel, and with that the order of its sums, by the number of rows. Here a weight has one tile, whatever is multiplied with it:
the same instructions go through the inner dimension in the same order, and no other program takes part in a sum. What lies in the other
rows of a tile changes nothing, since each row of a matrix instruction is a sum of its own.

*Some rows*: more than `engine.kernels.few_rows` is for, and too few for the library, of a narrow model. Then a step is made of launches,
and each of these does the work of two or three. A row times the norm's weight is rounded before the norm's own factor, which multiplies
sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.gate import ACTIVATIONS, activate
from penstock.engine.kernels.overlap import fetch, overlap, wait
from penstock.engine.model.norm import Norm

GROUP = 8  # tiles of rows that go through the weight together, so that it is read from the cache
WIDE = 8192  # outputs from which there are tiles enough for a whole device, however few rows there are
PROCESSORS_ELSEWHERE = 4  # where there is no GPU
SOME, NARROW = 256, 4096  # rows, and the longest inner dimension
ALONE = 64  # rows up to which a product with nothing but a sum around it is done here: beyond, the library reads rows fewer times
LINE, MOST_LINES = 128, 32  # bytes of a line of the second-level cache, and how many of each row of the weight are fetched ahead


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, add, out, rows, outer, inner, x_row, epsilon,
    ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the result. WHOLE: the inner dimension is a multiple of INNER. KIND: of activation, below 0: no gate; else
    the weight has `outer` rows more, and what they give is multiplied with what is activated."""
    row_tiles, outer_tiles = tl.cdiv(rows, ROWS), tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    first = program // (GROUP * outer_tiles) * GROUP
    group = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * outer_tiles)
    m = (first + within % group) * ROWS + tl.arange(0, ROWS)
    n = within // group * OUTER + tl.arange(0, OUTER)
    k = tl.arange(0, INNER)
    # What is beyond the last output is the last one again, so that loads need no mask: it is not stored. Rows beyond the last are not read.
    there = (m < rows)[:, None]
    a_at = x + m.to(tl.int64)[:, None] * x_row + k[None, :]
    columns = weight + tl.minimum(n, outer - 1).to(tl.int64) * inner
    b_at = columns[None, :] + k[:, None]
    c_at = b_at + outer * inner
    if LINES > 0:
        early = tl.arange(0, LINES) * LINE
        fetch(columns[:, None] + early[None, :], (n < outer)[:, None] & (early < inner)[None, :], OVERLAP)
        if KIND >= 0:
            fetch(columns[:, None] + outer * inner + early[None, :], (n < outer)[:, None] & (early < inner)[None, :], OVERLAP)
    wait(OVERLAP)
    acc = tl.zeros([ROWS, OUTER], tl.float32)
    up = tl.zeros([ROWS, OUTER], tl.float32)
    squares = tl.zeros([ROWS, INNER], tl.float32)
    for low in range(0, inner, INNER):
        inside = k < inner - low
        if WHOLE:
            a = tl.load(a_at, mask=there, other=0.0)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=there & inside[None, :], other=0.0)
            b = tl.load(b_at, mask=inside[:, None], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += wide * wide
            scale = tl.load(norm + low + k, mask=inside, other=0.0).to(tl.float32)
            a = (wide * scale[None, :]).to(x.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if KIND >= 0:
            c = tl.load(c_at) if WHOLE else tl.load(c_at, mask=inside[:, None], other=0.0)
            up = tl.dot(a, c, up, input_precision="ieee")
        a_at += INNER
        b_at += INNER
        c_at += INNER
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / inner + epsilon)[:, None]
        acc *= factor
        up *= factor
    if BIAS:
        acc += tl.load(bias + tl.minimum(n, outer - 1)).to(tl.float32)[None, :]
        if KIND >= 0:
            up += tl.load(bias + outer + tl.minimum(n, outer - 1)).to(tl.float32)[None, :]
    if KIND >= 0:
        acc = activate(acc, KIND) * up
    place = m.to(tl.int64)[:, None] * outer + n[None, :]
    there = there & (n < outer)[None, :]
    if ADD:
        acc += tl.load(add + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=there)


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


def tile_of_some(rows: int, outer: int, dtype: torch.dtype, processors: int, *, gated: bool) -> Tile:
    """For few rows the narrowest with which all programs of a product with `outer` results are on the device at once: what is read is the
    weight. The more rows, the larger, since each program reads rows of its own."""
    if dtype == torch.float32:
        return tile_for(outer, dtype)
    if rows > 64:
        return Tile(128, 64 if gated or rows <= 128 else 128, 64, 8, 4)
    return Tile(64, next((width for width in (16, 32, 64) if -(-outer // width) <= processors), 128), 64, 4, 5)


def is_some(rows: int, widest: int) -> bool:
    """Whether `multiply_some` is the way for so many rows, if the longest inner dimension is `widest`."""
    return rows <= SOME and widest <= NARROW


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, rounded once: a row's bits depend on that row alone.

    x `[rows, in]`, the numbers of a row side by side; weight `[out, in]`, contiguous; bias `[out]`; all float32, float16 or bfloat16, sums
    in float32. Returns `[rows, out]`.
    """
    return _launch(tile_for(weight.shape[0], x.dtype), 0, x, weight, bias, None, None, None)


def multiply_some(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None = None, add: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`norm(x) @ weight.T + bias`, then one of these: plus `add`; or the activation of its first half times the other. For up to `SOME`
    rows, else as `multiply_rows`; add `[rows, out]`, contiguous, may be what is returned. Returns `[rows, out]`, or half as wide."""
    if add is not None and norm is None and bias is None and len(x) > ALONE:
        return add.addmm_(x, weight.t())
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else PROCESSORS_ELSEWHERE
    outer = weight.shape[0] if activation is None else weight.shape[0] // 2
    lines = min(MOST_LINES, triton.next_power_of_2(triton.cdiv(weight.shape[1] * x.itemsize, LINE)))
    tile = tile_of_some(len(x), outer, x.dtype, processors, gated=activation is not None)
    return _launch(tile, lines, x, weight, bias, norm, add, activation)


def _launch(
    tile: Tile, lines: int, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, add: Tensor | None, activation: str | None
) -> Tensor:
    rows, inner = x.shape
    outer = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((rows, outer), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    _multiply[(triton.cdiv(rows, tile.rows) * triton.cdiv(outer, tile.outer),)](
        x, weight, x if bias is None else bias, x if norm is None else norm.weight, x if add is None else add, out, rows, outer, inner,
        x.stride(0), 0.0 if norm is None else norm.epsilon,
        ROWS=tile.rows, OUTER=tile.outer, INNER=tile.inner, WHOLE=inner % tile.inner == 0, GROUP=GROUP, BIAS=bias is not None,
        NORM=norm is not None, KIND=-1 if activation is None else ACTIVATIONS.index(activation), ADD=add is not None,
        LINE=LINE // x.itemsize, LINES=lines,
        num_warps=tile.warps, num_stages=tile.stages, **overlap(x),
    )  # fmt: skip
    return out
