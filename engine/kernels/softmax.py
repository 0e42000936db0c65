"""Online softmax over tiles of keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135): what all kernels of attention
do with the scores of a tile, and at the end. Scores are in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def weigh(scores, seen, softcap, best, total, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores `[rows, keys]` to weights, 0 where a key is not `seen`. `best` and `total` `[rows]` are those of the tiles before. Returns
    the weights, both with this tile, and what the sums of the tiles before are to be multiplied with."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    scores = tl.where(seen, scores * LOG2_E, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    return weights, higher, total * shrink + tl.sum(weights, 1), shrink


@triton.jit  # type: ignore[untyped-decorator]
def divide(acc, best, total, sinks, head, valid, SINKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of weighted values `[rows, dim]` by the sums of weights, a head's sink counted. Rows that saw nothing are 0."""
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        higher = tl.maximum(best, sink)
        total = total * tl.exp2(best - higher) + tl.exp2(sink - higher)
        acc = acc * tl.exp2(best - higher)[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
