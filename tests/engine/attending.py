"""A random step over a scattered, NaN-filled pool, and what attention should make of it in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import AttentionBackend, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.attention.storage import rounded


@dataclass
class Step:
    """One step of one layer: the pool holds what was computed before it, `q`, `k` and `v` are new. `expected` is float64."""

    shape: LayerShape
    pool: KVPool
    rows: StepRows
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    expected: Tensor

    def run(self, backend: AttentionBackend) -> Tensor:
        positions = self.rows.positions()
        places = self.rows.places(positions, self.pool.block_size)
        columns = backend.prepare(self.rows, positions, places)
        device = self.q.device
        columns = {"sources": self.rows.slots, "positions": positions} | columns
        backend.begin(
            {
                name: torch.from_numpy(np.ascontiguousarray(c.astype(np.int64) if c.dtype.kind == "i" else c)).to(device)
                for name, c in columns.items()
            }
        )
        layer = LayerAttention(self.shape, *self.pool.layers[0], backend)
        # Strided as transformers hands them over: heads before tokens.
        return layer(*(x.transpose(0, 1)[None] for x in (self.q, self.k, self.v)), self.sinks)[0]


def make_step(
    shape: LayerShape,
    decodes: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    begun_as_zero: bool = True,
) -> Step:
    """Decodes at the given positions, chunks as (start, count). Blocks, slots and values are random. The pool is of `kv_dtype` (None: of
    `dtype`), and what is expected is made of keys and values as it keeps them. `begun_as_zero`: the unwritten part of
    a block that an earlier step began to fill is zero, as `GatherAttention` leaves it; else it is NaN like all the rest."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    starts = np.array([*decodes, *(start for start, _ in chunks)], np.int32)
    counts = np.array([*(1 for _ in decodes), *(count for _, count in chunks)], np.int32)
    ends = starts + counts
    needed = -(-ends // block_size)
    pool = KVPool([shape], int(needed.sum()) + 3, block_size, kv_dtype or dtype, torch.device(device))
    pool.fill(float("nan"))
    slots = rng.permutation(len(starts) + 2)[: len(starts)].astype(np.int32)
    free = iter(rng.permutation(pool.blocks).tolist())
    table = np.full((len(starts) + 2, int(needed.max()) + 1), pool.blocks - 1, np.int32)
    written = []
    for slot, blocks in zip(slots.tolist(), needed.tolist(), strict=True):
        for column in range(blocks):
            table[slot, column] = next(free)
            written.append((slot, column))
    tokens = int(counts.sum())

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    q = draw(tokens, shape.heads, shape.head_dim)
    sinks = draw(shape.heads) if shape.sinks else None
    new_keys, new_values, expected = [], [], []
    token = 0
    for row, slot in enumerate(slots.tolist()):
        start, end = int(starts[row]), int(ends[row])
        drawn = draw(end, shape.kv_heads, shape.head_dim), draw(end, shape.kv_heads, shape.value_dim)
        keys, values = (rounded(x, pool.dtype).to(dtype) for x in drawn)
        if begun_as_zero and start % block_size:
            pool.clear(torch.tensor([int(table[slot, start // block_size])], device=device))
        for position in range(start):
            block, offset = int(table[slot, position // block_size]), position % block_size
            pool.layers[0][0][block, :, offset] = keys[position]
            pool.layers[0][1][block, :, offset] = values[position]
        new_keys.append(drawn[0][start:])
        new_values.append(drawn[1][start:])
        for position in range(start, end):
            expected.append(naive(shape, q[token], keys[: position + 1], values[: position + 1], sinks))
            token += 1
    slots_written, columns_written = (np.array(part, np.int32) for part in zip(*written, strict=True))
    rows = StepRows(slots, starts, counts, len(decodes), table, (slots_written, columns_written))
    return Step(shape, pool, rows, q, torch.cat(new_keys), torch.cat(new_values), sinks, torch.stack(expected))


def naive(shape: LayerShape, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
    """One query `[heads, head_dim]` over all that it may see, in float64."""
    low = 0 if shape.window is None else max(0, len(keys) - shape.window)
    shared = shape.heads // shape.kv_heads
    k, v = (x[low:].double().repeat_interleave(shared, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", q.double(), k) * shape.scaling
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("hn,nhd->hd", weights[:, : len(k)], v)
