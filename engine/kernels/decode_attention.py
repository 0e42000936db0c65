"""Paged attention of decodes in Triton: one query a row, whose keys are split among programs where rows alone do not fill the device.

The query heads that share a KV head are rows of the same tile, so a key is loaded once for all of them. The program of a row that ends
last merges the splits (flash-decoding), so there is no second launch. How long a row is is read on the device: a launch fits any lengths,
and a CUDA graph too.

Where a layer's products come straight from its fused query-key-value product, norms and rotary embedding of the heads are part of the same
launch (`Turns`). The newest key and value are then taken from there, and written to the pool on the way; all others are of earlier steps,
and the first of them are fetched while the product still runs.

Pool: keys `[blocks, kv_heads, block_size, dim]`, values alike, of the queries' dtype or e4m3. Row r's query is at position `starts[r]` of
its sequence, whose blocks are `table[slots[r]]`. `slots` and `starts` are int64, `table` is int32. Loads are masked: what was never written
cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.attention.base import LayerShape
from penstock.engine.kernels.heads import turned
from penstock.engine.kernels.overlap import fetch, overlap, wait
from penstock.engine.kernels.softmax import LOG2_E, divide, in_base_2, weigh
from penstock.engine.kernels.storage import rounded

MOST_SPLITS = 16  # programs among which the keys of one decode may be split


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    q, keys, values, out, sinks, slots, starts, table, count, columns, q_token, q_head, scaling, softcap, window,
    splits, part_out, part_max, part_sum, tickets, weights, cos, sin, places, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    TURN: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: the SHARED query heads of one KV head of one row, over one split of the keys."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    there = row < tl.load(count)
    position = tl.load(starts + row).to(tl.int32)
    entries = table + tl.load(slots + row) * columns
    m = tl.arange(0, ROWS)
    head = kv_head * SHARED + m % SHARED
    valid = m < SHARED
    n = tl.arange(0, KEYS)
    d = tl.arange(0, PADDED_DIM)
    e = tl.arange(0, PADDED_VALUE_DIM)

    low = 0
    if WINDOW:
        low = tl.maximum(position - window + 1, 0) // SIZE * SIZE
    high = position + 1
    if TURN:
        high = position
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - low, splits), KEYS) * KEYS
        low = low + split * share
        high = tl.minimum(low + share, high)
        early = low + n < tl.where(there, high, 0)
        first = tl.load(entries + (low + n) // SIZE, mask=early, other=0).to(tl.int64)
        first = (first * KV_HEADS + kv_head) * SIZE + (low + n) % SIZE
        part = tl.arange(0, LINES) * (PADDED_DIM // LINES)
        fetch(keys + first[:, None] * DIM + part[None, :], early[:, None] & (part < DIM)[None, :], OVERLAP)
        part = tl.arange(0, LINES) * (PADDED_VALUE_DIM // LINES)
        fetch(values + first[:, None] * VALUE_DIM + part[None, :], early[:, None] & (part < VALUE_DIM)[None, :], OVERLAP)
    wait(OVERLAP)
    if not there:
        return

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    source = q + row.to(tl.int64) * q_token
    if TURN:
        dtype: tl.constexpr = q.dtype.element_ty
        cos_at, sin_at = cos + position * PAIRS, sin + position * PAIRS
        queries = turned(
            source + head[:, None] * DIM, valid[:, None], weights + head[:, None] * DIM, cos_at, sin_at, epsilon, DIM, PADDED_DIM, PAIRS,
            NORM,
        ).to(dtype)  # fmt: skip
        if split == 0:  # the one that there always is takes the newest key
            one = tl.arange(0, 1)[:, None]
            k_head, v_head = HEADS + kv_head, HEADS + KV_HEADS + kv_head
            k = turned(
                source + k_head * DIM + one, one == 0, weights + k_head * DIM, cos_at, sin_at, epsilon, DIM, PADDED_DIM, PAIRS, NORM
            ).to(dtype)  # fmt: skip
            v = tl.load(source + v_head * DIM + one + e[None, :], mask=(e < VALUE_DIM)[None, :], other=0.0)
            k, v = rounded(k, keys.dtype.element_ty), rounded(v, values.dtype.element_ty)  # as later tokens will read them
            place = tl.load(places + row)
            newest = (place // SIZE * KV_HEADS + kv_head) * SIZE + place % SIZE
            written = (d < tl.where(place >= 0, DIM, 0))[None, :]
            tl.store(keys + newest * DIM + one + d[None, :], k, mask=written)
            written = (e < tl.where(place >= 0, VALUE_DIM, 0))[None, :]
            tl.store(values + newest * VALUE_DIM + one + e[None, :], v, mask=written)
            scores, factor = in_base_2(tl.sum(queries.to(tl.float32) * k.to(tl.float32), 1), scaling, softcap, SOFTCAP)
            best = scores * factor
            total += 1.0
            acc += v.to(tl.float32)
    else:
        queries = tl.load(source + head[:, None] * q_head + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    for at in range(low, high, KEYS):
        inside = at + n < high
        block = tl.load(entries + (at + n) // SIZE, mask=inside, other=0).to(tl.int64)
        line = (block * KV_HEADS + kv_head) * SIZE + (at + n) % SIZE
        k = tl.load(keys + line[None, :] * DIM + d[:, None], mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
        v = tl.load(values + line[:, None] * VALUE_DIM + e[None, :], mask=inside[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
        seen = inside
        if WINDOW:
            seen = seen & (at + n > position - window)
        scores = tl.dot(queries, k.to(queries.dtype), input_precision="ieee")
        weights_of, best, total, shrink = weigh(scores, seen[None, :], scaling, softcap, best, total, SOFTCAP, True)
        acc = acc * shrink[:, None] + tl.dot(weights_of.to(queries.dtype), v.to(queries.dtype), input_precision="ieee")

    mine = valid[:, None] & (e < VALUE_DIM)[None, :]
    if SPLIT:
        part = (row.to(tl.int64) * HEADS + head) * splits + split
        tl.store(part_out + part[:, None] * VALUE_DIM + e[None, :], acc, mask=mine)
        tl.store(part_max + part, best, mask=valid)
        tl.store(part_sum + part, total, mask=valid)
        tl.debug_barrier()  # all threads have stored before one of them says so
        ticket = tickets + row * KV_HEADS + kv_head
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.debug_barrier()
            tl.store(ticket, 0)  # for the next launch
            _merge(row.to(tl.int64) * HEADS + kv_head * SHARED, kv_head * SHARED, part_out, part_max, part_sum, out, sinks, splits,
                   SHARED, VALUE_DIM, PADDED_VALUE_DIM, SPLITS, SINKS)  # fmt: skip
    else:
        acc = divide(acc, best, total, sinks, head, valid, SINKS)
        line = row.to(tl.int64) * HEADS + head
        tl.store(out + line[:, None] * VALUE_DIM + e[None, :], acc.to(out.dtype.element_ty), mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    first, first_head, part_out, part_max, part_sum, out, sinks, splits,
    SHARED: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The splits of SHARED heads, `first` and on. Others wrote them: what this multiprocessor's own cache has of them may be old."""
    s = tl.arange(0, SPLITS)
    e = tl.arange(0, PADDED_VALUE_DIM)
    there = s < splits
    for one in tl.static_range(SHARED):
        part = (first + one) * splits + s
        best = tl.load(part_max + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(part_sum + part, mask=there, other=0.0, cache_modifier=".cg")
        mask = there[:, None] & (e < VALUE_DIM)[None, :]
        acc = tl.load(part_out + part[:, None] * VALUE_DIM + e[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        highest = tl.max(best, 0)
        if SINKS:
            sink = tl.load(sinks + first_head + one).to(tl.float32) * LOG2_E
            highest = tl.maximum(highest, sink)
        weight = tl.exp2(best - highest)
        whole = tl.sum(total * weight, 0)
        if SINKS:
            whole += tl.exp2(sink - highest)
        merged = tl.sum(acc * weight[:, None], 0) / whole
        tl.store(out + (first + one) * VALUE_DIM + e, merged.to(out.dtype.element_ty), mask=e < VALUE_DIM)


@dataclass(frozen=True, slots=True)
class Decodes:
    """The decodes of a launch: up to `rows`, and as many as `count` int64 `[1]` says. `splits` is among how many programs the keys of
    each are split."""

    slots: Tensor
    starts: Tensor
    table: Tensor
    count: Tensor
    rows: int
    splits: int


def splits_for(rows: int, kv_heads: int, processors: int, longest: int) -> int:
    """How many splits to make of rows of up to `longest` keys, on a device of so many multiprocessors: none where rows alone are enough
    for nearly all of them, else about four programs for each."""
    programs = max(rows, 1) * kv_heads
    return 1 if programs > 0.9 * processors else max(1, min(MOST_SPLITS, 4 * processors // programs, -(-longest // 64)))


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program goes through its keys."""

    keys: int
    warps: int
    stages: int


def tile_for(shape: LayerShape, dtype: torch.dtype, whole: int | None) -> Tile:
    """Measured best, or near it, at 576 and 2,048 keys: large tiles where there are few programs, and each has a `whole` row. Where rows
    are split, it matters more that little shared memory is taken: what is left is cache for the products of few rows beside it."""
    if dtype == torch.float32 or max(padded_dim(shape.head_dim), padded_dim(shape.value_dim)) > 128:
        return Tile(32, 4, 2)
    if whole is None:
        return Tile(64, 2, 1)
    return Tile(128, 4, 2) if whole <= 256 else Tile(64, 2, 3)


@dataclass(frozen=True, slots=True)
class Turns:
    """How the heads of a fused query-key-value product are normed and turned before they attend: see `engine.kernels.heads.turn_heads`.
    `places` int64 `[tokens]`: where the newest keys and values go."""

    weights: Tensor | None
    epsilon: float
    cos: Tensor
    sin: Tensor
    places: Tensor


def attend_decodes(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, decodes: Decodes, tickets: Tensor, shape: LayerShape, sinks: Tensor | None,
    turns: Turns | None = None,
) -> None:  # fmt: skip
    """Attend with the first rows of q `[tokens, heads, head_dim]` into the same of out `[tokens, heads, value_dim]`, contiguous.

    With `turns`, q is the fused product `[tokens, heads + 2 * kv_heads, head_dim]`, and the newest keys and values, which are in it, are
    written to the pool; without, they are there already. Any head dimension up to 256, float32, float16 or bfloat16. `tickets` are int32
    zeros, at least `[rows * kv_heads]`, and zeros again afterwards.
    """
    heads, kv_heads, dim, value_dim = shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim
    splits, rows = decodes.splits, decodes.rows
    tile = tile_for(shape, q.dtype, rows * kv_heads if splits == 1 else None)
    parts = [out, out, out]
    if splits > 1:
        parts = [q.new_empty((rows, heads, splits, *more), dtype=torch.float32) for more in ((value_dim,), (), ())]
    turning = (q, q, q, q, 0.0) if turns is None else (
        q if turns.weights is None else turns.weights, turns.cos, turns.sin, turns.places, turns.epsilon
    )  # fmt: skip
    _decode[(kv_heads, splits, rows)](
        q, keys, values, out, out if sinks is None else sinks, decodes.slots, decodes.starts, decodes.table,
        decodes.count, decodes.table.shape[1],
        q.stride(0), q.stride(1), shape.scaling, shape.softcap or 0.0, shape.window or 0, splits, *parts, tickets, *turning,
        HEADS=heads, KV_HEADS=kv_heads, SHARED=heads // kv_heads, ROWS=padded_dim(heads // kv_heads), KEYS=tile.keys, SIZE=keys.shape[2],
        DIM=dim, PADDED_DIM=padded_dim(dim), VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded_dim(value_dim),
        SPLIT=splits > 1, SPLITS=8 if splits <= 8 else MOST_SPLITS, SOFTCAP=shape.softcap is not None, WINDOW=shape.window is not None,
        SINKS=sinks is not None, TURN=turns is not None, NORM=turns is not None and turns.weights is not None,
        PAIRS=1 if turns is None else turns.cos.shape[1], LINES=max(1, padded_dim(max(dim, value_dim)) * keys.itemsize // 128),
        num_warps=tile.warps, num_stages=tile.stages, **overlap(q),
    )  # fmt: skip


def padded_dim(dim: int) -> int:
    """A power of two, and at least what a matrix instruction takes."""
    return max(16, int(triton.next_power_of_2(dim)))
