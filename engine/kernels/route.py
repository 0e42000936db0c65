"""Which expert does what: for each token the best of a router's logits, and its pairs with them sorted by expert.

A pair is a token and one of the experts that are chosen for it: pair p is of token `p // chosen`. The products (`engine.kernels.experts`)
take the pairs of one expert in tiles. How many tiles there are is known on the device only, so a launch has programs for as many as there
can be: it fits any routing, and a CUDA graph too. Nothing depends on the order in which programs run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import overlap, wait
from penstock.engine.model.experts import Mixture

BLOCK = 8192  # pairs that a program looks at at a time


@triton.jit  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    logits, weights, experts, logits_row,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, CHOSEN: tl.constexpr, PLACES: tl.constexpr, RENORMALIZE: tl.constexpr,
    ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one token. Rows that only fill up a CUDA graph may be NaN: they too choose experts that there are."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)
    i = tl.arange(0, PLACES)
    wait(OVERLAP)
    x = tl.load(logits + row * logits_row + e, mask=e < EXPERTS, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    highest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - highest), 0)
    weight = tl.zeros([PLACES], tl.float32)
    expert = tl.zeros([PLACES], tl.int32)
    for place in tl.static_range(CHOSEN):
        best = tl.max(x, 0)
        which = tl.argmax(x, 0)
        weight = tl.where(i == place, tl.exp(best - highest), weight)
        expert = tl.where(i == place, which, expert)
        x = tl.where(e == which, float("-inf"), x)
    if RENORMALIZE:
        total = tl.sum(weight, 0)
    weight = weight / total
    if ROUND:
        weight = weight.to(logits.dtype.element_ty).to(tl.float32)
    tl.store(weights + row * CHOSEN + i, weight, mask=i < CHOSEN)
    tl.store(experts + row * CHOSEN + i, expert, mask=i < CHOSEN)


@triton.jit(do_not_specialize=["pairs"])  # type: ignore[untyped-decorator]
def _sort(  # type: ignore[no-untyped-def]
    experts, order, tiles, count, pairs,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: the pairs of one expert. It counts those of all of them, to know where its own begin."""
    expert = tl.program_id(0)
    e = tl.arange(0, PADDED)
    b = tl.arange(0, BLOCK)
    wait(OVERLAP)
    counts = tl.zeros([PADDED], tl.int32)
    for at in range(0, pairs, BLOCK):
        inside = at + b < pairs
        counts += tl.histogram(tl.load(experts + at + b, mask=inside, other=0), PADDED, mask=inside)
    first = tl.sum(tl.where(e < expert, counts, 0), 0)
    end = first + tl.sum(tl.where(e == expert, counts, 0), 0)
    filled = (counts + ROWS - 1) // ROWS
    tile = tl.sum(tl.where(e < expert, filled, 0), 0)
    if expert == EXPERTS - 1:
        tl.store(count, tl.sum(filled, 0))
    for at in range(first, end, ROWS * PADDED):
        begin = at + e * ROWS
        mine = begin < end
        line = tiles + 3 * (tile + (begin - first) // ROWS)
        tl.store(line, expert, mask=mine)
        tl.store(line + 1, begin, mask=mine)
        tl.store(line + 2, end, mask=mine)
    for at in range(0, pairs, BLOCK):
        mine = (tl.load(experts + at + b, mask=at + b < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + first + tl.cumsum(mine, 0) - 1, at + b, mask=mine > 0)
        first += tl.sum(mine, 0)


@dataclass(frozen=True, slots=True)
class Routes:
    """`weights` float32 `[tokens, chosen]`. `order` int32 `[pairs]`: pairs, those of an expert together and in order. `tiles` int32
    `[most tiles, 3]`: an expert, and from where to where in `order` its pairs are that are left from this tile on, which takes `rows`
    of them; there are as many as `count` int32 `[1]` says."""

    weights: Tensor
    order: Tensor
    tiles: Tensor
    count: Tensor
    rows: int


def route_rows(logits: Tensor, mixture: Mixture, rows: int) -> Routes:
    """For each token the experts with the largest of a router's logits `[tokens, experts]`, of equal ones the first, in tiles of `rows`.

    Weights are the softmax over all experts, computed in float32, and whatever else the `mixture` says.
    """
    tokens, experts = logits.shape
    chosen, device = mixture.chosen, logits.device
    pairs = tokens * chosen
    weights = torch.empty((tokens, chosen), dtype=torch.float32, device=device)
    choices, order = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    most = (pairs + min(pairs, experts) * (rows - 1)) // rows
    tiles = torch.empty((most, 3), dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    padded = max(32, triton.next_power_of_2(experts))
    _choose[(tokens,)](
        logits, weights, choices, logits.stride(0), EXPERTS=experts, PADDED=padded, CHOSEN=chosen, PLACES=triton.next_power_of_2(chosen),
        RENORMALIZE=mixture.renormalized, ROUND=mixture.rounded, num_warps=1, **overlap(logits),
    )  # fmt: skip
    block = min(BLOCK, max(128, triton.next_power_of_2(pairs)))
    _sort[(experts,)](
        choices, order, tiles, count, pairs, EXPERTS=experts, PADDED=padded, ROWS=rows, BLOCK=block,
        num_warps=max(1, min(16, block // 256)), **overlap(logits),
    )  # fmt: skip
    return Routes(weights, order, tiles, count, rows)
