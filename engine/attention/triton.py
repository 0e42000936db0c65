"""Paged attention with the Triton kernels: the production path on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.kernels.paged_attention import Rows, attend_rows, queries_in_tile, write_rows


class TritonAttention:
    """`engine.attention.base.AttentionBackend` for a `KVPool`. The block tables live on the device and get only what changed."""

    sorts_decodes = False

    def __init__(self, pool: KVPool, layers: Sequence[LayerShape], slots: int, columns: int) -> None:
        device = pool.stacks[0].device
        self.pool = pool
        self.table = torch.zeros((slots, columns), dtype=torch.int32, device=device)
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.tiles = {
            queries_in_tile(layer.heads // layer.kv_heads, layer.head_dim, pool.stacks[0].dtype): None for layer in layers
        }  # an ordered set: how many queries a tile holds is all that layers differ in
        self.decodes: Rows | None = None
        self.chunks: dict[int, Rows] = {}
        self.places = self.table
        self._shape = (0, 0, 0, 0)  # rows, decodes, tokens, longest

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        slots, columns = rows.written
        written = slots.astype(np.int64) * rows.table.shape[1] + columns
        decodes = rows.decodes
        longest = int(rows.starts[:decodes].max()) + 1 if decodes else 0
        self._shape = (len(rows.slots), decodes, len(positions), longest)
        # An entry written twice by one plan gets its last value both times, so that the order on the device does not matter.
        sent: Columns = {"table.at": written, "table.blocks": rows.table[slots, columns]} if len(written) else {}
        sent |= {"places": places, "row.slots": rows.slots, "row.starts": rows.starts, "row.firsts": rows.firsts}
        for queries in self.tiles if decodes < len(rows.slots) else ():
            tiles = -(-rows.counts[decodes:] // queries)
            befores = np.repeat(np.cumsum(tiles) - tiles, tiles)
            sent[f"tile.rows.{queries}"] = np.repeat(np.arange(decodes, len(rows.slots)), tiles)
            sent[f"tile.offsets.{queries}"] = (np.arange(len(befores)) - befores) * queries
        return sent

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        if "table.at" in columns:
            self.table.view(-1).index_copy_(0, columns["table.at"], columns["table.blocks"].int())
        self.places = columns["places"]
        rows, decodes, _, longest = self._shape
        slots, starts, firsts = columns["row.slots"], columns["row.starts"], columns["row.firsts"]
        self.decodes = Rows(slots, starts, firsts, self.table, decodes, longest) if decodes else None
        self.chunks = {}
        for queries in self.tiles if decodes < rows else ():
            tile_rows, offsets = columns[f"tile.rows.{queries}"], columns[f"tile.offsets.{queries}"]
            self.chunks[queries] = Rows(slots, starts, firsts, self.table, len(tile_rows), 0, tile_rows, offsets)

    def attend(self, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        shape = layer.shape
        write_rows(k, layer.keys, self.places)
        write_rows(v, layer.values, self.places)
        if q.stride(2) != 1:
            q = q.contiguous()
        out = q.new_empty((len(q), shape.heads, shape.value_dim))
        queries = queries_in_tile(shape.heads // shape.kv_heads, shape.head_dim, q.dtype)
        for rows in (self.decodes, self.chunks.get(queries)):
            if rows is not None:
                attend_rows(
                    q, layer.keys, layer.values, out, rows, scaling=shape.scaling, softcap=shape.softcap, window=shape.window,
                    sinks=sinks, processors=self.processors,
                )  # fmt: skip
        return out
