"""A token for each row: the largest of its logits, or the draw of `engine.noise`, whose noise is computed on the way.

Exact noise is two logarithms in float64 for each token id of each row, far more work than to read the logits. So one pass finds about how
high each chunk of a row comes, in float32, and a second computes exactly only those chunks that may hold the highest: nearly always one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import overlap, wait

CHUNK = 2048  # token ids a program looks at
TILE = 1024  # of them at once
# How far a score of the first pass may be from the exact one, with room to spare: noise in float32 is within 1e-4 (its logarithms have a
# relative error of 1e-5 at most), and a quotient or sum of size s is rounded to within s times 2^-23.
ERROR, RELATIVE = tl.constexpr(1e-3), tl.constexpr(2.0**-21)
NONE = tl.constexpr(2147483647)  # an id that no token has


@triton.jit
def _hash(key, ids):  # type: ignore[no-untyped-def]
    """Of `engine.noise`: 64 bits, as unsigned."""
    x = key.to(tl.uint64, bitcast=True) + (ids.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _noise_about(x):  # type: ignore[no-untyped-def]
    """-log(-log(u)) of hashes x in float32, within `ERROR`. In its upper half u is 1 - p, where p, and so -log(u), has its full precision
    however near to 1 u is."""
    upper = x >= 0x8000000000000000
    p = ((tl.where(upper, x ^ 0xFFFFFFFFFFFFFFFF, x) >> 12).to(tl.int64).to(tl.float32) + 0.5) * 2.220446049250313e-16
    w = tl.where(upper & (p < 0.015625), p * (1 + p * (0.5 + p * 0.333333343)), -tl.log(tl.where(upper, 1 - p, p)))
    return -tl.log(w)


@triton.jit  # type: ignore[untyped-decorator]
def _about_highest(  # type: ignore[no-untyped-def]
    logits, temperature, keys, highest, vocab_size, row_stride, chunks, CHUNK: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr
):
    """One program: one chunk of one row. `highest`: about its highest score."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    t = tl.load(temperature + row)
    key = tl.load(keys + row)
    wait(OVERLAP)
    best = tl.full([TILE], float("-inf"), tl.float32)
    for tile in tl.static_range(0, CHUNK, TILE):
        ids = chunk * CHUNK + tile + tl.arange(0, TILE)
        inside = ids < vocab_size
        score = tl.load(logits + row * row_stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
        if t > 0:
            score = tl.where(inside, score / t + _noise_about(_hash(key, ids)), float("-inf"))
        best = tl.maximum(best, score)
    tl.store(highest + row * chunks + chunk, tl.max(best, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    logits, temperature, keys, highest, ids, last, slots, vocab_size, row_stride, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row. Ties go to the lowest id."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    key = tl.load(keys + row)
    chunk = tl.arange(0, CHUNKS)
    wait(OVERLAP)
    about = tl.load(highest + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    top = tl.max(about, 0)
    slack = 2 * (ERROR + RELATIVE * tl.abs(top))
    possible = (chunk < chunks) & (about >= tl.where(slack < float("inf"), top - slack, top))
    best, best_id = float("-inf"), NONE
    at = tl.min(tl.where(possible, chunk, CHUNKS), 0)
    while at < CHUNKS:
        token = at * CHUNK + tl.arange(0, CHUNK)
        inside = token < vocab_size
        score = tl.load(logits + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
        if t > 0:
            u = ((_hash(key, token) >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
            noise = (-tl.log(-tl.log(u))).to(tl.float32)
            score = tl.where(inside, tl.div_rn(score, t) + noise, float("-inf"))
        found = tl.max(score, 0)
        first = tl.min(tl.where(score == found, token, NONE), 0)
        better = found > best
        best = tl.where(better, found, best)
        best_id = tl.where(better, first, best_id)
        at = tl.min(tl.where(possible & (chunk > at), chunk, CHUNKS), 0)
    best_id = tl.where(best_id == NONE, 0, best_id).to(tl.int64)  # a row of -inf or NaN: no score is the highest
    tl.store(ids + row, best_id)
    if KEEP:
        tl.store(last + tl.load(slots + row), best_id)


def sample_rows(logits: Tensor, temperature: Tensor, keys: Tensor, last: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """A token for each row.

    `logits` `[rows, vocab_size]`, any float type; `temperature` float32 `[rows]`: 0 takes the largest; `keys` int64 `[rows]` of
    `engine.noise`. With `last` int64 `[slots]` and `slots` int64 `[rows]`, the tokens are written there too. Returns int64 `[rows]`: the
    ids that `engine.noise.draw` gives for the same values; of equal ones the lowest.
    """
    rows, vocab_size = logits.shape
    chunks = triton.cdiv(vocab_size, CHUNK)
    highest = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    given, size = (logits, temperature, keys, highest), (vocab_size, logits.stride(0), chunks)
    # What is drawn from, and by what, may be of any kernel, so it begins when all before it is done.
    _about_highest[(rows, chunks)](*given, *size, CHUNK=CHUNK, TILE=TILE, num_warps=4, **overlap(logits, early=False))
    keep = last is not None and slots is not None
    _choose[(rows,)](
        *given, ids, last if keep else ids, slots if keep else ids, *size,
        CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), KEEP=keep, num_warps=4, **overlap(logits),
    )  # fmt: skip
    return ids
