"""A token for each row in one pass over the logits: the largest, or the draw of `engine.noise`, whose noise is computed on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # token ids a program looks at
TILE = 1024  # of them at once


@triton.jit  # type: ignore[untyped-decorator]
def _largest_score(  # type: ignore[no-untyped-def]
    logits, temperature, keys, best_scores, best_ids, vocab_size, row_stride, chunks, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """One program: one chunk of one row. Ties go to the lowest id."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    t = tl.load(temperature + row)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    best = float("-inf")
    best_id = chunk * CHUNK
    for tile in range(0, CHUNK, TILE):
        ids = chunk * CHUNK + tile + tl.arange(0, TILE)
        inside = ids < vocab_size
        score = tl.load(logits + row * row_stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
        if t > 0:
            x = key + (ids.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB
            x = x ^ (x >> 31)
            u = ((x >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
            noise = (-tl.log(-tl.log(u))).to(tl.float32)
            score = tl.where(inside, tl.div_rn(score, t) + noise, float("-inf"))
        highest = tl.max(score, axis=0)
        first = tl.min(tl.where(score == highest, ids, 2147483647), axis=0)
        better = highest > best
        best = tl.where(better, highest, best)
        best_id = tl.where(better, first, best_id)
    tl.store(best_scores + row * chunks + chunk, best)
    tl.store(best_ids + row * chunks + chunk, tl.minimum(best_id, vocab_size - 1))


@triton.jit  # type: ignore[untyped-decorator]
def _choose(best_scores, best_ids, ids, last, slots, chunks, CHUNKS: tl.constexpr, KEEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: the chunks of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    there = chunk < chunks
    score = tl.load(best_scores + row * chunks + chunk, mask=there, other=float("-inf"))
    mine = tl.load(best_ids + row * chunks + chunk, mask=there, other=2147483647)
    best = tl.min(tl.where(score == tl.max(score, 0), mine, 2147483647), 0)
    best = tl.where(best == 2147483647, 0, best).to(tl.int64)  # a row of NaN: no score is the largest
    tl.store(ids + row, best)
    if KEEP:
        tl.store(last + tl.load(slots + row), best)


def sample_rows(logits: Tensor, temperature: Tensor, keys: Tensor, last: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """A token for each row.

    `logits` `[rows, vocab_size]`, any float type; `temperature` float32 `[rows]`: 0 takes the largest; `keys` int64 `[rows]` of
    `engine.noise`. With `last` int64 `[slots]` and `slots` int64 `[rows]`, the tokens are written there too. Returns int64 `[rows]`: the
    ids that `engine.noise.draw` gives for the same values; of equal ones the lowest.
    """
    rows, vocab_size = logits.shape
    chunks = triton.cdiv(vocab_size, CHUNK)
    scores = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    best = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _largest_score[(rows, chunks)](
        logits, temperature, keys, scores, best, vocab_size, logits.stride(0), chunks, CHUNK=CHUNK, TILE=TILE, num_warps=4
    )
    keep = last is not None and slots is not None
    _choose[(rows,)](
        scores, best, ids, last if keep else ids, slots if keep else ids, chunks,
        CHUNKS=triton.next_power_of_2(chunks), KEEP=keep, num_warps=1,
    )  # fmt: skip
    return ids
