"""Paged attention in Triton, for steps that mix decodes and prefill chunks of many sequences.

Online softmax over tiles of keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). The query heads that share a KV
head are rows of the same tile, so a key is loaded once for all of them. Decodes may split their keys over several programs, whose partial
results are merged afterwards (flash-decoding). Loads are masked before anything is multiplied: what was never written cannot matter.

Pool: keys `[blocks, kv_heads, block_size, head_dim]`, values alike. Query tokens lie one after another: row r's are `firsts[r]` on, at
positions `starts[r]` on of its sequence, whose blocks are `table[slots[r]]`. All of these are int64, but `table`, which is int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SPLITS = 32  # programs among which the keys of one decode may be split


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
    mask = inside[:, None] & (d < dim)[None, :]
    place = tl.load(places + token, mask=inside, other=0)
    line = (place // SIZE * heads + head) * SIZE + place % SIZE
    x = tl.load(new + token.to(tl.int64)[:, None] * new_token + head * new_head + d[None, :], mask=mask)
    tl.store(pool + line[:, None] * dim + d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["split_size", "splits"])  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    q, keys, values, out, sinks, slots, starts, firsts, tile_rows, tile_offsets, table, columns,
    q_token, q_head, heads, kv_heads, dim, value_dim, scaling, softcap, window, split_size, splits, part_out, part_max, part_sum,
    SHARED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: up to QUERIES tokens of one row, for the SHARED query heads of one KV head; for a decode, over one split of the keys."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if DECODE:
        row = tile
        start = tl.load(starts + row).to(tl.int32)
        first = tl.load(firsts + row)
        last = start
    else:
        row = tl.load(tile_rows + tile)
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
    if SPLIT:
        low = low + tl.program_id(2) * split_size
        high = tl.minimum(low + split_size, high)

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
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        seen = inside[None, :] & (n[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + line[:, None] * value_dim + e[None, :], mask=inside[:, None] & (e < value_dim)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher

    columns_mask = valid[:, None] & (e < value_dim)[None, :]
    if SPLIT:
        part = (token * heads + head) * splits + tl.program_id(2)
        tl.store(part_out + part[:, None] * value_dim + e[None, :], acc, mask=columns_mask)
        tl.store(part_max + part, best, mask=valid)
        tl.store(part_sum + part, total, mask=valid)
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(best, sink)
            total = total * tl.exp2(best - higher) + tl.exp2(sink - higher)
            acc = acc * tl.exp2(best - higher)[:, None]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (token * heads + head)[:, None] * value_dim + e[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=columns_mask)


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator]
def _merge_splits(  # type: ignore[no-untyped-def]
    part_out, part_max, part_sum, out, sinks, heads, value_dim, splits,
    SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: the splits of one decode and head."""
    place = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    s = tl.arange(0, SPLITS)
    e = tl.arange(0, VALUE_DIM)
    there = s < splits
    best = tl.load(part_max + place * splits + s, mask=there, other=float("-inf"))
    total = tl.load(part_sum + place * splits + s, mask=there, other=0.0)
    parts = tl.load(
        part_out + (place * splits + s)[:, None] * value_dim + e[None, :], mask=there[:, None] & (e < value_dim)[None, :], other=0.0
    )
    highest = tl.max(best, 0)
    if SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    weight = tl.exp2(best - highest)
    whole = tl.sum(total * weight, 0)
    if SINKS:
        whole = whole + tl.exp2(sink - highest)
    merged = tl.sum(parts * weight[:, None], 0) / whole
    tl.store(out + place * value_dim + e, merged.to(out.dtype.element_ty), mask=e < value_dim)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one launch. `tile_rows` and `tile_offsets` (in tokens from the row's first) say which queries each tile of a prefill
    holds; for decodes, a row each, they are None. `longest` is the most keys that a decode sees."""

    slots: Tensor
    starts: Tensor
    firsts: Tensor
    table: Tensor
    rows: int
    longest: int = 0
    tile_rows: Tensor | None = None
    tile_offsets: Tensor | None = None


def write_rows(new: Tensor, pool: Tensor, places: Tensor) -> None:
    """Keys or values of new tokens `[tokens, kv_heads, dim]` to `places` int64 `[tokens]`, counted in tokens from the start of the pool."""
    tokens, heads, dim = new.shape
    if new.stride(2) != 1:
        new = new.contiguous()
    block = 16
    _write_rows[(triton.cdiv(tokens, block), heads)](
        new, pool, places, tokens, new.stride(0), new.stride(1), heads, dim,
        SIZE=pool.shape[2], TOKENS=block, DIM=_padded(dim), num_warps=4,
    )  # fmt: skip


def queries_in_tile(shared: int, head_dim: int, dtype: torch.dtype) -> int:
    """How many tokens of a prefill chunk a tile holds, for `shared` query heads on a KV head."""
    return _prefill_rows(shared, head_dim, dtype) // shared


def attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, rows: Rows, *,
    scaling: float, softcap: float | None, window: int | None, sinks: Tensor | None, processors: int,
) -> None:  # fmt: skip
    """Attend with `q` `[tokens, heads, head_dim]` into `out` `[tokens, heads, value_dim]`, contiguous: only the tokens of `rows`.

    Any head dimension up to 256, float32, float16 or bfloat16. `processors` is the device's number of multiprocessors: decodes too few
    to fill it are split.
    """
    heads, dim = q.shape[1:]
    kv_heads, size = keys.shape[1:3]
    value_dim = values.shape[3]
    shared = heads // kv_heads
    decode = rows.tile_rows is None
    wide = q.dtype == torch.float32
    splits, split_size = 1, 0
    if decode:
        block_rows, block_keys, warps, stages = _padded(shared), 32 if wide or _padded(dim) > 128 else 64, 4, 2
        seen = min(rows.longest, window + size) if window is not None else rows.longest
        splits = min(MOST_SPLITS, triton.cdiv(2 * processors, rows.rows * kv_heads), triton.cdiv(seen, 256))
        split_size = triton.cdiv(triton.cdiv(seen, splits), block_keys) * block_keys
        splits = triton.cdiv(seen, split_size)
        queries = 1
    else:
        block_rows = _prefill_rows(shared, dim, q.dtype)
        block_keys = 32 if wide or _padded(dim) > 128 else 64
        warps, stages = 8 if block_rows >= 128 else 4, 2
        queries = block_rows // shared
    shape = (len(q), heads, splits)
    parts = [q.new_empty((*shape, value_dim), dtype=torch.float32)] if splits > 1 else [out]
    parts += [q.new_empty(shape, dtype=torch.float32) for _ in range(2)] if splits > 1 else [out, out]
    sink_values = sinks if sinks is not None else out
    grid = (rows.rows, kv_heads, splits)
    _attend_tile[grid](
        q, keys, values, out, sink_values, rows.slots, rows.starts, rows.firsts,
        rows.firsts if rows.tile_rows is None else rows.tile_rows, rows.firsts if rows.tile_offsets is None else rows.tile_offsets,
        rows.table, rows.table.shape[1], q.stride(0), q.stride(1), heads, kv_heads, dim, value_dim,
        scaling, softcap or 0.0, window or 0, split_size, splits, *parts,
        SHARED=shared, QUERIES=queries, ROWS=block_rows, KEYS=block_keys, SIZE=size, DIM=_padded(dim), VALUE_DIM=_padded(value_dim),
        DECODE=decode, SPLIT=splits > 1, SOFTCAP=softcap is not None, WINDOW=window is not None, SINKS=sinks is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _merge_splits[(rows.rows, heads)](
            *parts, out, sink_values, heads, value_dim, splits,
            SPLITS=MOST_SPLITS, VALUE_DIM=_padded(value_dim), SINKS=sinks is not None, num_warps=4,
        )  # fmt: skip


def _padded(dim: int) -> int:
    """A power of two, and at least what a matrix instruction takes."""
    return max(16, int(triton.next_power_of_2(dim)))


def _prefill_rows(shared: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a prefill tile, so that it fits shared memory and registers."""
    rows = 128 if dtype != torch.float32 and _padded(head_dim) <= 128 else 32 if dtype == torch.float32 else 64
    return max(rows, _padded(shared))
