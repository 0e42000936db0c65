"""The products of a feed-forward made of experts, each over the pairs of a token and an expert that are one expert's, tile by tile.

Gate and up are one launch, with the activation and the gate at its end; down is another, with the router's weight at its end; a third sums
what a token's experts gave, in the order of their weights, so that the same step gives the same numbers. Programs of the same tile are
neighbours: what they share comes from the cache, and with a tile for each expert its weights are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.gate import ACTIVATIONS, activate
from penstock.engine.kernels.overlap import overlap, wait
from penstock.engine.kernels.route import route_rows
from penstock.engine.model.experts import Mixture

SUM_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, out, order, tiles, count, scales, x_row,
    INNER: tl.constexpr, OUTER: tl.constexpr, CHOSEN: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of one tile. KIND 0 or more: gate and up, from rows of tokens to rows in the order of `order`; below 0:
    down, from those to rows of pairs."""
    BLOCKS: tl.constexpr = (OUTER + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    wait(OVERLAP)
    if tile >= tl.load(count):
        return
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    row = tl.load(tiles + 3 * tile + 1) + tl.arange(0, ROWS)
    inside = row < tl.load(tiles + 3 * tile + 2)
    pair = tl.load(order + row, mask=inside, other=0)
    source = pair // CHOSEN if KIND >= 0 else tl.where(inside, row, 0)
    line = tl.minimum(n, OUTER - 1)  # of the weight; what is beyond it is not stored
    a_at = x + source.to(tl.int64)[:, None] * x_row + k[None, :]
    w_at = weight + (expert * (OUTER * (2 if KIND >= 0 else 1)) + line)[None, :] * INNER + k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, INNER, DEPTH):
        if INNER % DEPTH == 0:
            a = tl.load(a_at + at)
            w = tl.load(w_at + at)
        else:
            a = tl.load(a_at + at, mask=(at + k < INNER)[None, :], other=0.0)
            w = tl.load(w_at + at, mask=(at + k < INNER)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
        if KIND >= 0:
            if INNER % DEPTH == 0:
                v = tl.load(w_at + OUTER * INNER + at)
            else:
                v = tl.load(w_at + OUTER * INNER + at, mask=(at + k < INNER)[:, None], other=0.0)
            up = tl.dot(a, v, up, input_precision="ieee")
    if KIND >= 0:
        acc = activate(acc, KIND) * up
        target = row
    else:
        acc = acc * tl.load(scales + pair, mask=inside, other=0.0)[:, None]
        target = pair
    at = out + target.to(tl.int64)[:, None] * OUTER + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (n < OUTER)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sum(  # type: ignore[no-untyped-def]
    parts, add, out, width, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One program: a block of one token."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    wait(OVERLAP)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(CHOSEN):
        total += tl.load(parts + (row * CHOSEN + i) * width + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(add + row * width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program goes through its product. It has `columns` of the weight's rows: of gate and up, half of each."""

    columns: int
    depth: int
    warps: int
    stages: int


def rows_in_tile(mean: float, dtype: torch.dtype) -> int:
    """Pairs of a tile, for so many an expert: one tile is enough for most of them, as far as a program can hold it."""
    rows = next((rows for rows, enough in ((16, 8), (32, 24), (64, 64)) if mean <= enough), 128)
    return min(rows, 32) if dtype == torch.float32 else rows


def tile_for(rows: int, cells: int, dtype: torch.dtype) -> Tile:
    """For tiles of so many rows, which have so many `cells`, counted in columns. Many rows want large tiles; few want many bytes on their
    way, and, where there are few cells, programs for all of the device."""
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2)
    if rows >= 64:
        return Tile(256, 64, 8, 3)
    return Tile(128, 64, 4, 4) if cells > 2**15 else Tile(64, 128, 4, 4)


def mix_rows(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, mixture: Mixture, activation: str, add: Tensor | None = None
) -> Tensor:
    """What the experts that a router's `logits` `[tokens, experts]` choose make of x `[tokens, hidden]`, summed by its weights.

    Rows of x and logits are without gaps inside. gate_up `[experts, 2 * inner, hidden]`, the gate first, and down
    `[experts, hidden, inner]` are contiguous, and of x's dtype. `activation` is one of `engine.kernels.gate.ACTIVATIONS`. add
    `[tokens, hidden]`, contiguous, is summed too. Sums are in float32; what is between the products, and each expert's part, is rounded to
    x's dtype. Returns `[tokens, hidden]`.
    """
    (tokens, hidden), chosen, inner = x.shape, mixture.chosen, mixture.inner
    routes = route_rows(logits, mixture, rows_in_tile(tokens * chosen / mixture.experts, x.dtype))
    middle = torch.empty((tokens * chosen, inner), dtype=x.dtype, device=x.device)
    parts = torch.empty((tokens * chosen, hidden), dtype=x.dtype, device=x.device)
    for source, weight, to, kind in ((x, gate_up, middle, ACTIVATIONS.index(activation)), (middle, down, parts, -1)):
        width, most = to.shape[1], len(routes.tiles)
        tile = tile_for(routes.rows, most * width, x.dtype)
        columns = tile.columns // 2 if kind >= 0 else tile.columns
        _multiply[(most * triton.cdiv(width, columns),)](
            source, weight, to, routes.order, routes.tiles, routes.count, routes.weights, source.stride(0),
            INNER=source.shape[1], OUTER=width, CHOSEN=chosen, KIND=kind, ROWS=routes.rows, COLUMNS=columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, **overlap(x),
        )  # fmt: skip
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    _sum[(tokens, triton.cdiv(hidden, SUM_BLOCK))](
        parts, out if add is None else add, out, hidden, CHOSEN=chosen, BLOCK=SUM_BLOCK, ADD=add is not None, num_warps=4, **overlap(x)
    )
    return out
