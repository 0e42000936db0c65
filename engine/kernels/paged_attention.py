"""Paged attention of prefill chunks in Triton, and keys and values into the pool.

The query heads that share a KV head are rows of the same tile, so a key is loaded once for all of them. Most tiles of keys are seen whole
by all queries of a tile: these are not masked at all. Those at the edges are, before anything is multiplied: what was never written cannot
matter. A tile of keys begins at a multiple of its size, so how a prompt is cut into chunks does not change what is summed with what.

Pool: keys `[blocks, kv_heads, block_size, head_dim]`, values alike, of the queries' dtype or e4m3; a sequence's blocks are
`table[slot]`, int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.attention.base import LayerShape
from penstock.engine.kernels.decode_attention import padded_dim
from penstock.engine.kernels.overlap import overlap, wait
from penstock.engine.kernels.softmax import divide, weigh
from penstock.engine.kernels.storage import rounded


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _write_rows(  # type: ignore[no-untyped-def]
    new, pool, places, tokens, new_token, new_head, heads, dim,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one head, into the pool."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    d = tl.arange(0, DIM)
    inside = token < tokens
    place = tl.load(places + token, mask=inside, other=-1)
    mask = (place >= 0)[:, None] & (d < dim)[None, :]
    line = (place // SIZE * heads + head) * SIZE + place % SIZE
    x = tl.load(new + token.to(tl.int64)[:, None] * new_token + head * new_head + d[None, :], mask=mask)
    tl.store(pool + line[:, None] * dim + d[None, :], rounded(x, pool.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_keys(  # type: ignore[no-untyped-def]
    low, high, end, best, total, acc, queries, position, kv_head, keys, values, entries, scaling, softcap, window,
    KV_HEADS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Keys from `low`, a multiple of KEYS, to `high`; there are none from `end` on."""
    n = tl.arange(0, KEYS)
    d = tl.arange(0, PADDED_DIM)
    e = tl.arange(0, PADDED_VALUE_DIM)
    # Blocks are read a tile ahead, or each tile would wait for them first.
    next_block = tl.load(entries + (low + n) // SIZE, mask=low + n < end, other=0)
    for at in tl.range(low, high, KEYS, num_stages=STAGES):
        block = next_block.to(tl.int64)
        next_block = tl.load(entries + (at + KEYS + n) // SIZE, mask=at + KEYS + n < end, other=0)
        line = (block * KV_HEADS + kv_head) * SIZE + n % SIZE
        inside = at + n < end
        seen = inside[None, :] & (at + n[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (at + n[None, :] > position[:, None] - window)
        if MASKED or DIM != PADDED_DIM:
            k = tl.load(keys + line[:, None] * DIM + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys + line[:, None] * DIM + d[None, :])
        scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision="ieee")
        weights, best, total, shrink = weigh(scores, seen, scaling, softcap, best, total, SOFTCAP, MASKED)
        if MASKED or VALUE_DIM != PADDED_VALUE_DIM:
            v = tl.load(values + line[:, None] * VALUE_DIM + e[None, :], mask=inside[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
        else:
            v = tl.load(values + line[:, None] * VALUE_DIM + e[None, :])
        acc = tl.dot(weights.to(queries.dtype), v.to(queries.dtype), acc * shrink[:, None], input_precision="ieee")
    return best, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    q, keys, values, out, sinks, slots, starts, firsts, counts, table, columns, q_token, q_head, scaling, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one row, for the SHARED query heads of one KV head."""
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    count = tl.load(counts + tile).to(tl.int32)
    start = tl.load(starts + tile).to(tl.int32)
    first = tl.load(firsts + tile)
    entries = table + tl.load(slots + tile) * columns
    wait(OVERLAP)
    if count == 0:
        return

    m = tl.arange(0, ROWS)
    head = kv_head * SHARED + m % SHARED
    valid = m // SHARED < count
    position = start + m // SHARED
    token = first + m // SHARED
    d = tl.arange(0, PADDED_DIM)
    e = tl.arange(0, PADDED_VALUE_DIM)
    queries = tl.load(
        q + token[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)

    # All queries see the keys from `whole` to `most`; some see some before, if there is a window, and after.
    end = start + count
    whole = 0
    most = (start + 1) // KEYS * KEYS
    if WINDOW:
        low = tl.maximum(start - window + 1, 0) // KEYS * KEYS
        whole = tl.cdiv(tl.maximum(end - window, 0), KEYS) * KEYS
        best, total, acc = _attend_keys(
            low, tl.minimum(whole, end), end, best, total, acc, queries, position, kv_head, keys, values, entries, scaling, softcap, window,
            KV_HEADS, KEYS, SIZE, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, SOFTCAP, WINDOW, True, 1,
        )  # fmt: skip
    best, total, acc = _attend_keys(
        whole, most, end, best, total, acc, queries, position, kv_head, keys, values, entries, scaling, softcap, window,
        KV_HEADS, KEYS, SIZE, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, SOFTCAP, WINDOW, False, STAGES,
    )  # fmt: skip
    best, total, acc = _attend_keys(
        tl.maximum(whole, most), end, end, best, total, acc, queries, position, kv_head, keys, values, entries, scaling, softcap, window,
        KV_HEADS, KEYS, SIZE, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, SOFTCAP, WINDOW, True, 1,
    )  # fmt: skip

    acc = divide(acc, best, total, sinks, head, valid, SINKS)
    place = (token * HEADS + head)[:, None] * VALUE_DIM + e[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=valid[:, None] & (e < VALUE_DIM)[None, :])


@dataclass(frozen=True, slots=True)
class Chunks:
    """The prefill chunks of a launch, cut into tiles of `queries_in_tile` tokens at most. For each tile, int64: the slot of its sequence,
    the position of its first token there, where this is in the step's flat list, and how many tokens it has, or none. The block tables
    are int32 `[slots, columns]`."""

    slots: Tensor
    starts: Tensor
    firsts: Tensor
    counts: Tensor
    table: Tensor


def write_rows(new: Tensor, pool: Tensor, places: Tensor) -> None:
    """Keys or values of new tokens `[tokens, kv_heads, dim]` to `places` int64 `[tokens]`, counted in tokens from the start of the pool;
    below 0: nowhere."""
    tokens, heads, dim = new.shape
    if new.stride(2) != 1:
        new = new.contiguous()
    block = 16
    _write_rows[(triton.cdiv(tokens, block), heads)](
        new, pool, places, tokens, new.stride(0), new.stride(1), heads, dim,
        SIZE=pool.shape[2], TOKENS=block, DIM=padded_dim(dim), num_warps=4,
    )  # fmt: skip


def queries_in_tile(shared: int, head_dim: int, dtype: torch.dtype) -> int:
    """How many tokens of a prefill chunk a tile holds, for `shared` query heads on a KV head."""
    return _tile_rows(shared, head_dim, dtype) // shared


def attend_chunks(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, chunks: Chunks, shape: LayerShape, sinks: Tensor | None) -> None:
    """Attend with `q` `[tokens, heads, head_dim]` into `out` `[tokens, heads, value_dim]`, contiguous: only the tokens of `chunks`.

    Any head dimension up to 256, float32, float16 or bfloat16.
    """
    heads, kv_heads, dim, value_dim = shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim
    shared, padded, padded_value = heads // kv_heads, padded_dim(dim), padded_dim(value_dim)
    block_rows = _tile_rows(shared, dim, q.dtype)
    small = q.dtype == torch.float32 or max(padded, padded_value) > 128
    _attend_tile[(kv_heads, len(chunks.slots))](
        q, keys, values, out, out if sinks is None else sinks, chunks.slots, chunks.starts, chunks.firsts, chunks.counts, chunks.table,
        chunks.table.shape[1], q.stride(0), q.stride(1), shape.scaling, shape.softcap or 0.0, shape.window or 0,
        HEADS=heads, KV_HEADS=kv_heads, SHARED=shared, ROWS=block_rows, KEYS=32 if small else 64, SIZE=keys.shape[2],
        DIM=dim, PADDED_DIM=padded, VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded_value,
        SOFTCAP=shape.softcap is not None, WINDOW=shape.window is not None, SINKS=sinks is not None, STAGES=2 if small else 3,
        num_warps=8 if block_rows >= 128 else 4, **overlap(q),
    )  # fmt: skip


def _tile_rows(shared: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a tile, a query and head each, so that it fits shared memory and registers."""
    rows = 128 if dtype != torch.float32 and padded_dim(head_dim) <= 128 else 32 if dtype == torch.float32 else 64
    return max(rows, padded_dim(shared))
