"""Online softmax over tiles of keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135): what all kernels of attention
do with the scores of a tile, and at the end. The largest score is kept in base 2, so that a scale and a difference are one instruction."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def weigh(scores, seen, scaling, softcap, best, total, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of queries and keys `[rows, keys]` to weights, 0 where a key is not `seen`; with MASKED off all are. `best` and `total`
    `[rows]` are those of the tiles before. Returns the weights, both with this tile, and what the sums of the tiles before are to be
    multiplied with."""
    scores, factor = in_base_2(scores, scaling, softcap, SOFTCAP)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1) * factor)
    base = higher
    if MASKED:
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(best - base)
    return weights, higher, total * shrink + tl.sum(weights, 1), shrink


@triton.jit  # type: ignore[untyped-decorator]
def in_base_2(scores, scaling, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores, and what they are still to be multiplied with."""
    factor = scaling * LOG2_E
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (scores * scaling) / softcap) + 1.0))
        factor = LOG2_E
    return scores, factor


@triton.jit  # type: ignore[untyped-decorator]
def divide(acc, best, total, sinks, head, valid, SINKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of weighted values `[rows, dim]` by the sums of weights, a head's sink counted. Rows that saw nothing are 0."""
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        higher = tl.maximum(best, sink)
        total = total * tl.exp2(best - higher) + tl.exp2(sink - higher)
        acc = acc * tl.exp2(best - higher)[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
