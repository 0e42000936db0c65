"""Paged attention in plain torch, on any device and in any dtype.

Whole blocks are gathered with `index_select` into buffers that are kept, a few rows at a time, so that what was gathered is still in the
cache when `scaled_dot_product_attention` reads it. Decode rows come sorted by length and share a call with rows of about their length; the
query heads that share a KV head become that head's queries, so nothing is repeated. Masks are built once a step for each window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention.base import Columns, Int32, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.attention.storage import raw, rounded
from penstock.engine.plan import Float32

GROUP_TOKENS = 2048  # keys gathered at once: what stays in a core's cache, and large enough to be worth a call
PIECE_SCORES = 1 << 22  # scores of one prefill call: bounds the mask


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What layers must share to share the indices of a step."""

    window: int | None
    heads: int
    kv_heads: int


def kind_of(shape: LayerShape) -> Kind:
    return Kind(shape.window, shape.heads, shape.kv_heads)


@dataclass(frozen=True, slots=True)
class Group:
    """Decode rows `[low, high)` of the step, padded to `blocks` blocks each; `name` leads to their indices and their mask."""

    low: int
    high: int
    blocks: int
    name: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Query tokens `[low, high)` of one prefill row, over `blocks` gathered blocks; or, if `fresh`, over those very tokens."""

    low: int
    high: int
    blocks: int
    name: str
    fresh: bool


class GatherAttention:
    """`engine.attention.base.AttentionBackend` for a `KVPool`."""

    sorts_decodes = True
    fuses = False

    def __init__(self, pool: KVPool, layers: Sequence[LayerShape]) -> None:
        self.pool, self.block_size = pool, pool.block_size
        self.kinds = tuple(dict.fromkeys(kind_of(layer) for layer in layers))
        self.decodes = 0
        self.groups: dict[Kind, list[Group]] = {}
        self.chunks: dict[Kind, list[Chunk]] = {}
        self.columns: Mapping[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.buffers: dict[int, Tensor] = {}

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        """Indices and masks for every kind of layer."""
        columns: Columns = {}
        self.decodes = rows.decodes
        self._prepare_decodes(rows, places, columns)
        if self._reads_blocks(rows):
            columns["begun"] = self._begun(rows, positions, places)
        for kind in self.kinds:
            self.chunks[kind] = []
            for row in range(rows.decodes, len(rows.slots)):
                self.chunks[kind] += self._chunk(rows, row, kind, columns)
        return columns

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self.columns, self.masks = columns, {}
        if "begun" in columns:
            self.pool.clear(columns["begun"])

    def attend(self, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        k, v = rounded(k, self.pool.dtype), rounded(v, self.pool.dtype)
        parts = self._attend_decodes(layer, q, k, v, sinks)
        for chunk in self.chunks[kind_of(layer.shape)]:
            parts.append(self._attend_chunk(layer, chunk, q, k, v, sinks))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # ── decodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prepare_decodes(self, rows: StepRows, places: Int32, columns: Columns) -> None:
        size = self.block_size
        for kv_heads in {kind.kv_heads for kind in self.kinds}:
            heads = np.arange(kv_heads, dtype=np.int32)
            lines = (places[:, None] // size * kv_heads + heads) * size + places[:, None] % size
            columns[f"lines.{kv_heads}"] = lines.ravel()
        for kind in self.kinds:
            self.groups[kind] = self._group(rows, kind, columns)

    def _group(self, rows: StepRows, kind: Kind, columns: Columns) -> list[Group]:
        size, window = self.block_size, kind.window
        starts, slots = rows.starts[: rows.decodes], rows.slots[: rows.decodes]
        lows = np.zeros_like(starts) if window is None else np.maximum(starts - (window - 1), 0) // size
        spans = starts // size + 1 - lows  # blocks that a row reads
        groups = []
        low = 0
        while low < rows.decodes:
            most = max(1, GROUP_TOKENS // (size * int(spans[low])))
            high = min(low + most, rows.decodes)
            while high - low > 1 and (high - low) * int(spans[low:high].max()) * size > 2 * GROUP_TOKENS:
                high = low + (high - low) // 2
            some, blocks = slice(low, high), int(spans[low:high].max())
            name = f"{window}.{kind.heads}.{kind.kv_heads}.{low}"
            # Beyond a row's last block its first one is read again, masked: it is certainly written.
            steps = np.arange(blocks, dtype=np.int32)[None]
            steps = lows[some, None] + np.where(steps < spans[some, None], steps, 0)
            columns[f"blocks.{name}"] = _of_heads(rows.table[slots[some, None], steps], kind.kv_heads)
            keys = lows[some, None] * size + np.arange(blocks * size, dtype=np.int32)[None]
            columns[f"mask.{name}"] = additive(starts[some, None], keys, window)[:, None, None]
            groups.append(Group(low, high, blocks, name))
            low = high
        return groups

    def _attend_decodes(self, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> list[Tensor]:
        """Stores the keys and values of all tokens, then attends with the decodes."""
        shape, parts = layer.shape, []
        lines = self.columns[f"lines.{shape.kv_heads}"]
        for pool, new in ((layer.keys, k), (layer.values, v)):
            raw(pool).view(-1, pool.shape[-1]).index_copy_(0, lines, raw(new.reshape(-1, pool.shape[-1])))
        for group in self.groups[kind_of(shape)]:
            rows = group.high - group.low
            queries = q[group.low : group.high].reshape(rows, shape.kv_heads, -1, shape.head_dim)
            keys, values = self._gather(layer, group.name, rows, q.dtype)
            seen = attend(shape, queries, keys, values, self._mask(group.name, q.dtype), sinks, grouped=True)
            parts.append(seen.reshape(rows, shape.heads, shape.value_dim))
        return parts

    # ── prefill ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _chunk(self, rows: StepRows, row: int, kind: Kind, columns: Columns) -> list[Chunk]:
        start, count, base = int(rows.starts[row]), int(rows.counts[row]), int(rows.counts[:row].sum())
        size, window = self.block_size, kind.window
        if start == 0 and (window is None or window >= count):
            return [Chunk(base, base + count, 0, "", True)]
        step = max(1, PIECE_SCORES // (start + count))
        chunks = []
        for low in range(0, count, step):
            high = min(low + step, count)
            name = f"{window}.{kind.heads}.{kind.kv_heads}.{base + low}"
            first = 0 if window is None else max(start + low - (window - 1), 0) // size
            blocks = (start + high - 1) // size + 1 - first
            columns[f"blocks.{name}"] = _of_heads(rows.table[rows.slots[row], first : first + blocks][None], kind.kv_heads)
            queries = np.arange(start + low, start + high, dtype=np.int32)[:, None]
            keys = first * size + np.arange(blocks * size, dtype=np.int32)[None]
            columns[f"mask.{name}"] = additive(queries, keys, window)[None, None]
            chunks.append(Chunk(base + low, base + high, blocks, name, False))
        return chunks

    def _attend_chunk(self, layer: LayerAttention, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        some = slice(chunk.low, chunk.high)
        mask = None
        if chunk.fresh:
            keys, values = (x[some].to(q.dtype).transpose(0, 1)[None] for x in (k, v))
        else:
            keys, values = self._gather(layer, chunk.name, 1, q.dtype)
            mask = self._mask(chunk.name, q.dtype)
        seen = attend(layer.shape, q[some].transpose(0, 1)[None], keys, values, mask, sinks, grouped=False)
        return seen[0].transpose(0, 1)

    # ── both ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reads_blocks(self, rows: StepRows) -> bool:
        """Whether a step gathers whole blocks."""
        return True

    def _begun(self, rows: StepRows, positions: Int32, places: Int32) -> Int32:
        """Blocks whose first token is written in this step and whose last is not. They are zeroed first: the part that is not yet written
        takes part in the products, masked, and what lies there may be NaN (0 * NaN is NaN)."""
        lasts = rows.firsts[1:] - 1
        offsets = positions[lasts] % self.block_size
        begun = (offsets < self.block_size - 1) & (positions[lasts] - offsets >= rows.starts)
        return places[lasts][begun] // np.int32(self.block_size)

    def _gather(self, layer: LayerAttention, name: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Blocks of the pool to keys and values `[rows, kv_heads, tokens, dim]`, in the queries' `dtype`: views of buffers that the next
        call overwrites, if that is the pool's, too."""
        index = self.columns[f"blocks.{name}"]
        found = []
        for which, pool in enumerate((raw(layer.keys), raw(layer.values))):
            width = pool.shape[2] * pool.shape[3]
            buffer = self.buffers.get(which)
            if buffer is None or buffer.numel() < len(index) * width:
                buffer = self.buffers[which] = pool.new_empty(len(index) * width)
            chosen = buffer[: len(index) * width].view(len(index), width)
            torch.index_select(pool.view(-1, width), 0, index, out=chosen)
            found.append(chosen.view(self.pool.dtype).view(rows, layer.shape.kv_heads, -1, pool.shape[3]).to(dtype))
        return found[0], found[1]

    def _mask(self, name: str, dtype: torch.dtype) -> Tensor:
        mask = self.masks.get(name)
        if mask is None:
            mask = self.masks[name] = self.columns[f"mask.{name}"].to(dtype)
        return mask


def _of_heads(blocks: Int32, kv_heads: int) -> Int32:
    """Blocks `[rows, blocks]` to the index of each head's part of them, `[rows * kv_heads * blocks]`."""
    heads = np.arange(kv_heads, dtype=np.int32)[None, :, None]
    return (blocks[:, None, :] * np.int32(kv_heads) + heads).ravel()


def additive(queries: Int32, keys: Int32, window: int | None) -> Float32:
    """0 where a query at a position may see a key at another, else -inf: float32, of the two's broadcast shape."""
    hidden = keys > queries if window is None else (keys > queries) | (keys <= queries - window)
    return np.where(hidden, np.float32(-math.inf), np.float32(0))


def attend(shape: LayerShape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *, grouped: bool) -> Tensor:
    """Dense attention of q `[rows, heads, queries, dim]`, or `grouped` `[rows, kv_heads, heads / kv_heads, dim]`, over k and v `[rows,
    kv_heads, keys, dim]`. `mask` is additive and broadcastable to the scores; None: causal. Returns q's shape, with the value's dim."""
    if shape.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=shape.scaling, enable_gqa=not grouped and shape.heads != shape.kv_heads
        )
    rows, _, queries, _ = q.shape
    split = q if grouped else q.reshape(rows, shape.kv_heads, -1, shape.head_dim)
    scores = torch.matmul(split, k.transpose(2, 3)).float() * shape.scaling
    if not grouped:
        scores = scores.view(rows, shape.heads, queries, -1)
    if mask is None:
        mask = torch.full((queries, queries), -math.inf, device=q.device).triu(1)
    weights = weigh(shape, scores, mask, sinks, shape.kv_heads if grouped else shape.heads).to(v.dtype)
    if not grouped:
        weights = weights.reshape(rows, shape.kv_heads, -1, weights.shape[-1])
    seen = torch.matmul(weights, v)
    return seen if grouped else seen.view(rows, shape.heads, queries, -1)


def weigh(shape: LayerShape, scores: Tensor, mask: Tensor | None, sinks: Tensor | None, heads: int) -> Tensor:
    """Scaled scores, float32 `[rows, heads, queries, keys]`, to weights: soft-cap, mask, sinks, softmax. With `heads` = kv_heads, the heads
    that share one lie in the third dimension."""
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.float().view(1, heads, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]
