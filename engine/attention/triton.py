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
    of the slots comes one that stays empty, for rows that only fill up a CUDA graph."""

    sorts_decodes = False
    fuses = True

    def __init__(self, pool: KVPool, layers: Sequence[LayerShape], slots: int, columns: int) -> None:
        device = pool.stacks[0].device
        self.pool = pool
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
        self._shape = (0, 0, 0)  # rows, decodes, longest

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.table.shape[1]) * self.pool.block_size

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        decodes = rows.decodes
        self._shape = (len(rows.slots), decodes, int(rows.starts[:decodes].max()) + 1 if decodes else 0)
        sent = self.changes(rows.table, *rows.written) | {
            "places": places, "row.slots": rows.slots, "row.starts": rows.starts, "row.firsts": rows.firsts,
        }  # fmt: skip
        for queries in self.tiles if decodes < len(rows.slots) else ():
            tiles = -(-rows.counts[decodes:] // queries)
            befores = np.repeat(np.cumsum(tiles) - tiles, tiles)
            sent[f"tile.rows.{queries}"] = np.repeat(np.arange(decodes, len(rows.slots)), tiles)
            sent[f"tile.offsets.{queries}"] = (np.arange(len(befores)) - befores) * queries
        return sent

    def changes(self, table: Int32, slots: Int32, columns: Int32) -> Columns:
        """What `write_table` needs to follow the host's table."""
        if not len(slots):
            return {}
        # An entry written twice by one plan gets its last value both times, so that the order on the device does not matter.
        return {"table.at": slots.astype(np.int64) * table.shape[1] + columns, "table.blocks": table[slots, columns]}

    def write_table(self, columns: Mapping[str, Tensor]) -> None:
        if "table.at" in columns:
            self.table.view(-1).index_copy_(0, columns["table.at"], columns["table.blocks"].int())

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self.write_table(columns)
        self.places = columns["places"]
        rows, decodes, longest = self._shape
        slots, starts, firsts = columns["row.slots"], columns["row.starts"], columns["row.firsts"]
        self.decodes, self.chunks = None, {}
        if decodes:
            self.begin_decodes(slots, starts, self.places, decodes, longest)
        for queries in self.tiles if decodes < rows else ():
            tile_rows, offsets = columns[f"tile.rows.{queries}"], columns[f"tile.offsets.{queries}"]
            self.chunks[queries] = Chunks(slots, starts, firsts, self.table, tile_rows, offsets)

    def begin_decodes(self, slots: Tensor, starts: Tensor, places: Tensor, rows: int, longest: int) -> None:
        """A step of decodes alone, whose columns are on the device already. Lengths are read there: `longest` only decides how many
        programs share a row."""
        self.places, self.chunks = places, {}
        self.decodes = Decodes(slots, starts, self.table, rows, splits_for(rows, self.kv_heads, self.processors, longest))

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
