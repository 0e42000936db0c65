"""Paged attention of prefill chunks in Triton, and keys and values into the pool.

The query heads that share a KV head are rows of the same tile, so a key is loaded once for all of them. Loads are masked before anything
is multiplied: what was never written cannot matter.

Pool: keys `[blocks, kv_heads, block_size, head_dim]`, values alike. Query tokens lie one after another: row r's are `firsts[r]` on, at
positions `starts[r]` on of its sequence, whose blocks are `table[slots[r]]`. All of these are int64, but `table`, which is int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.attention.base import LayerShape
from penstock.engine.kernels.decode_attention import padded_dim
from penstock.engine.kernels.softmax import divide, weigh


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
    tl.store(pool + line[:, None] * dim + d[None, :], x, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    q, keys, values, out, sinks, slots, starts, firsts, tile_rows, tile_offsets, table, columns,
    q_token, q_head, heads, kv_heads, dim, value_dim, scaling, softcap, window,
    SHARED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: up to QUERIES tokens of one row, for the SHARED query heads of one KV head."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(tile_rows + tile)
    if row < 0:
        return
    offset = tl.load(tile_offsets + tile).to(tl.int32)
    start = tl.load(starts + row).to(tl.int32) + offset
    first = tl.load(firsts + row) + offset
    last = tl.minimum(start + QUERIES, (tl.load(firsts + row + 1) - first).to(tl.int32) + start) - 1
    slot = tl.load(slots + row)

    m = tl.arange(0, ROWS)
    head = kv_head * SHARED + m % SHARED
    position = start + m // SHARED
    valid = (m < QUERIES * SHARED) & (position <= last)
    token = first + m // SHARED
    d = tl.arange(0, DIM)
    e = tl.arange(0, VALUE_DIM)
    queries = tl.load(
        q + token[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=valid[:, None] & (d < dim)[None, :], other=0.0
    )

    low = 0
    if WINDOW:
        low = tl.maximum(start - window + 1, 0) // SIZE * SIZE
    high = last + 1

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    for at in range(low, high, KEYS):
        n = at + tl.arange(0, KEYS)
        inside = n < high
        block = tl.load(table + slot * columns + n // SIZE, mask=inside, other=0).to(tl.int64)
        line = (block * kv_heads + kv_head) * SIZE + n % SIZE
        k = tl.load(keys + line[None, :] * dim + d[:, None], mask=inside[None, :] & (d < dim)[:, None], other=0.0)
        scores = tl.dot(queries, k, input_precision="ieee") * scaling
        seen = inside[None, :] & (n[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        weights, best, total, shrink = weigh(scores, seen, softcap, best, total, SOFTCAP)
        v = tl.load(values + line[:, None] * value_dim + e[None, :], mask=inside[:, None] & (e < value_dim)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    acc = divide(acc, best, total, sinks, head, valid, SINKS)
    place = (token * heads + head)[:, None] * value_dim + e[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=valid[:, None] & (e < value_dim)[None, :])


@dataclass(frozen=True, slots=True)
class Chunks:
    """The prefill chunks of a launch, cut into tiles: `tile_rows` and `tile_offsets` (in tokens from the row's first) say which queries
    each holds. Tiles of a row below 0 hold none."""

    slots: Tensor
    starts: Tensor
    firsts: Tensor
    table: Tensor
    tile_rows: Tensor
    tile_offsets: Tensor


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
    shared = heads // kv_heads
    padded, padded_value = padded_dim(dim), padded_dim(value_dim)
    block_rows = _tile_rows(shared, dim, q.dtype)
    _attend_tile[(len(chunks.tile_rows), kv_heads)](
        q, keys, values, out, out if sinks is None else sinks, chunks.slots, chunks.starts, chunks.firsts, chunks.tile_rows,
        chunks.tile_offsets, chunks.table, chunks.table.shape[1], q.stride(0), q.stride(1), heads, kv_heads, dim, value_dim,
        shape.scaling, shape.softcap or 0.0, shape.window or 0,
        SHARED=shared, QUERIES=block_rows // shared, ROWS=block_rows, KEYS=32 if q.dtype == torch.float32 or padded > 128 else 64,
        SIZE=keys.shape[2], DIM=padded, VALUE_DIM=padded_value,
        SOFTCAP=shape.softcap is not None, WINDOW=shape.window is not None, SINKS=sinks is not None,
        num_warps=8 if block_rows >= 128 else 4, num_stages=2,
    )  # fmt: skip


def _tile_rows(shared: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a tile, a query and head each, so that it fits shared memory and registers."""
    rows = 128 if dtype != torch.float32 and padded_dim(head_dim) <= 128 else 32 if dtype == torch.float32 else 64
    return max(rows, padded_dim(shared))
