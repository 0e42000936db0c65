"""From a layer's fused query-key-value product to attention: norms of heads, rotary embedding, and keys and values into the pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import overlap, wait
from penstock.engine.kernels.storage import rounded

TOKENS = 16  # of one head, that a program takes where there are many


@triton.jit  # type: ignore[untyped-decorator]
def turned(  # type: ignore[no-untyped-def]
    x_at, there, weight_at, cos_at, sin_at, epsilon, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr
):
    """Heads normed and turned: float32 `[rows, PADDED_DIM]`, yet to be rounded. `x_at` `[rows, 1]` is where each begins, if it is `there`.
    The others are where the norm's weights, and the cosines and sines of its position begin: `[rows, 1]`, or one for all."""
    d = tl.arange(0, PADDED_DIM)
    # Each dimension beside the one that it is paired with, read again: it is in the cache, and needs no exchange between threads.
    pair = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
    turns = d < 2 * PAIRS
    x = tl.load(x_at + d[None, :], mask=there & (d < DIM)[None, :], other=0.0)
    other = tl.load(x_at + pair[None, :], mask=there & turns[None, :], other=0.0).to(tl.float32)
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + epsilon)[:, None]
        x = x * scale * tl.load(weight_at + d[None, :], mask=(d < DIM)[None, :], other=0.0).to(tl.float32)
        other = other * scale * tl.load(weight_at + pair[None, :], mask=turns[None, :], other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        other = other.to(dtype).to(tl.float32)
    c = tl.load(cos_at + (d % PAIRS)[None, :], mask=turns[None, :], other=1.0)
    s = tl.load(sin_at + (d % PAIRS)[None, :], mask=turns[None, :], other=0.0)
    return x * c + tl.where(d < PAIRS, -1.0, 1.0)[None, :] * other * s


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    qkv, weights, cos, sin, positions, places, q, keys, values, kept, tokens, qkv_row, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr,
    TOKENS: tl.constexpr, PADDED_DIM: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one head of queries, keys or values."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    there = token < tokens
    d = tl.arange(0, PADDED_DIM)
    mask = there[:, None] & (d < DIM)[None, :]
    position = tl.load(positions + token, mask=there, other=0)
    place = tl.load(places + token, mask=there, other=-1)
    wait(OVERLAP)
    source = qkv + token.to(tl.int64)[:, None] * qkv_row + head * DIM
    if head < HEADS + KV_HEADS:
        x = turned(
            source, there[:, None], weights + head * DIM, cos + position[:, None] * PAIRS, sin + position[:, None] * PAIRS, epsilon,
            DIM, PADDED_DIM, PAIRS, NORM,
        ).to(q.dtype.element_ty)  # fmt: skip
    else:
        x = tl.load(source + d[None, :], mask=mask, other=0.0)
    if head < HEADS:
        tl.store(q + (token.to(tl.int64)[:, None] * HEADS + head) * DIM + d[None, :], x, mask=mask)
    else:
        if KEEP and head < HEADS + KV_HEADS:
            tl.store(kept + (token.to(tl.int64)[:, None] * KV_HEADS + head - HEADS) * DIM + d[None, :], x, mask=mask)
        mask = mask & (place >= 0)[:, None]
        kv_head = (head - HEADS) % KV_HEADS
        line = (place // SIZE * KV_HEADS + kv_head) * SIZE + place % SIZE
        pool = keys
        if head >= HEADS + KV_HEADS:
            pool = values
        tl.store(pool + line[:, None] * DIM + d[None, :], rounded(x, pool.dtype.element_ty), mask=mask)


def turn_heads(
    qkv: Tensor, weights: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor, positions: Tensor, places: Tensor, keys: Tensor,
    values: Tensor, *, kept: Tensor | None = None, alike: bool = False,
) -> Tensor:  # fmt: skip
    """Norm and turn queries and keys, write keys and values to the pool, return the queries `[tokens, heads, dim]`.

    qkv `[tokens, (heads + 2 * kv_heads) * dim]`: queries, keys, values. `weights` `[heads + kv_heads, dim]` of an RMSNorm over each
    head, or None. cos and sin float32 `[positions, pairs]` of the first `2 * pairs` dimensions of a head, of which one and the one
    `pairs` further on turn together. positions int64 `[tokens]`; places int64 `[tokens]`, counted in tokens from the start of the pool,
    or below 0: then nothing is written. keys and values `[blocks, kv_heads, block_size, dim]`, of qkv's dtype or e4m3. `kept` `[tokens,
    kv_heads, dim]` gets all keys, too.
    `alike`: programs are the same for any number of tokens, and so are the bits of a token's norms, whose order of summing is the
    compiler's.
    """
    tokens = len(qkv)
    _, kv_heads, size, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    block = 1 if tokens <= 64 and not alike else TOKENS
    _turn[(triton.cdiv(tokens, block), heads + 2 * kv_heads)](
        qkv, q if weights is None else weights, cos, sin, positions, places, q, keys, values, q if kept is None else kept,
        tokens, qkv.stride(0), epsilon,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAIRS=cos.shape[1], SIZE=size, TOKENS=block,
        PADDED_DIM=triton.next_power_of_2(dim), NORM=weights is not None, KEEP=kept is not None,
        num_warps=1 if block == 1 else 8, **overlap(qkv),
    )  # fmt: skip
    return q
