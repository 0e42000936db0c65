"""Paged attention with the Triton kernels: the production path on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.kernels.decode_attention import Decodes, attend_decodes, splits_for
from penstock.engine.kernels.paged_attention import Chunks, attend_chunks, queries_in_tile, write_rows


class TritonAttention:
    """`engine.attention.base.AttentionBackend` for a `KVPool`. The block tables live on the device and get only what changed; after those
    of the slots comes one that stays empty, for rows that only fill up a CUDA graph.

    `deterministic`: a decode is a chunk of one token, so that the bits of a token do not depend on which it was, nor on how many programs
    would have shared its keys."""

    sorts_decodes = False
    fuses = True

    def __init__(self, pool: KVPool, layers: Sequence[LayerShape], slots: int, columns: int, *, deterministic: bool = False) -> None:
        device = pool.stacks[0].device
        self.pool, self.deterministic = pool, deterministic
        self.table = torch.zeros((slots + 1, columns), dtype=torch.int32, device=device)
        self.kv_heads = max(layer.kv_heads for layer in layers)
        self.tickets = torch.zeros((slots + 1) * self.kv_heads, dtype=torch.int32, device=device)
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.tiles = {
            queries_in_tile(layer.heads // layer.kv_heads, layer.head_dim, pool.stacks[0].dtype): None for layer in layers
        }  # an ordered set: how many queries a tile holds is all that layers differ in
        self.decodes: Decodes | None = None
        self.chunks: dict[int, Chunks] = {}
        self.places = self.table
        self._grid = (0, 0)  # decodes, and the longest of them

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.table.shape[1]) * self.pool.block_size

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        decodes = 0 if self.deterministic else rows.decodes
        self._grid = (decodes, int(rows.starts[:decodes].max()) + 1 if decodes else 0)
        sent: Columns = {"places": places, "decodes": np.array([decodes])}
        slots, columns = rows.written
        if len(slots):
            # An entry written twice by one plan gets its last value both times, so that the order on the device does not matter.
            sent |= {"table.at": slots.astype(np.int64) * rows.table.shape[1] + columns, "table.blocks": rows.table[slots, columns]}
        if decodes == len(rows.slots):
            return sent
        sent |= {"row.slots": rows.slots, "row.starts": rows.starts, "row.firsts": rows.firsts}
        for queries in self.tiles:
            tiles = -(-rows.counts[decodes:] // queries)
            befores = np.repeat(np.cumsum(tiles) - tiles, tiles)
            sent[f"tile.rows.{queries}"] = np.repeat(np.arange(decodes, len(rows.slots)), tiles)
            sent[f"tile.offsets.{queries}"] = (np.arange(len(befores)) - befores) * queries
        return sent

    def lengths(self, tokens: int, rows: int, *, chunks: bool) -> dict[str, tuple[int, int]]:
        """The columns of `prepare`, but those of the table, of any step of so many tokens and rows at most: how long they can be, and what
        fills them up so that it does nothing."""
        found = {"places": (tokens, -1)}
        if chunks or self.deterministic:
            found |= {"row.slots": (rows, rows), "row.starts": (rows, 0), "row.firsts": (rows + 1, 0)}
            for queries in self.tiles:
                most = tokens // queries + min(rows, tokens)
                found |= {f"tile.rows.{queries}": (most, -1), f"tile.offsets.{queries}": (most, 0)}
        return found

    def write_table(self, columns: Mapping[str, Tensor]) -> None:
        """Follow the host's table, with the two columns of `prepare` that say how, if they are there."""
        if "table.at" in columns:
            self.table.view(-1).index_copy_(0, columns["table.at"], columns["table.blocks"].int())

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self.write_table(columns)
        self.begin_sized(columns, *self._grid)

    def begin_sized(self, columns: Mapping[str, Tensor], decodes: int, longest: int) -> None:
        """`begin`, for up to so many decodes; `longest` only decides how many programs share one. In a step of decodes alone, which has
        no `row.` columns, slots and starts are those of the tokens."""
        self.places = columns["places"]
        slots, starts = columns.get("row.slots", columns["sources"]), columns.get("row.starts", columns["positions"])
        decodes = 0 if self.deterministic else decodes
        splits = splits_for(decodes, self.kv_heads, self.processors, longest)
        self.decodes = Decodes(slots, starts, self.table, columns["decodes"], decodes, splits) if decodes else None
        self.chunks = {
            queries: Chunks(
                slots, starts, columns["row.firsts"], self.table, columns[f"tile.rows.{queries}"], columns[f"tile.offsets.{queries}"]
            )
            for queries in self.tiles
            if f"tile.rows.{queries}" in columns
        }

    def attend(self, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        write_rows(k, layer.keys, self.places)
        write_rows(v, layer.values, self.places)
        return self.attend_written(layer, q if q.stride(2) == 1 else q.contiguous(), sinks)

    def attend_written(self, layer: LayerAttention, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        """`attend`, when keys and values are in the pool already; the last dimension of q lies together."""
        shape = layer.shape
        out = q.new_empty((len(q), shape.heads, shape.value_dim))
        if self.decodes is not None:
            attend_decodes(q, layer.keys, layer.values, out, self.decodes, self.tickets, shape, sinks)
        queries = queries_in_tile(shape.heads // shape.kv_heads, shape.head_dim, q.dtype)
        if queries in self.chunks:
            attend_chunks(q, layer.keys, layer.values, out, self.chunks[queries], shape, sinks)
        return out
