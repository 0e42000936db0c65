"""Paged attention with the Triton kernels: the production path on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.attention.prompt import LONG, attend_prompt, suits_prompt
from penstock.engine.kernels.decode_attention import Decodes, Turns, attend_decodes, splits_for
from penstock.engine.kernels.heads import turn_heads
from penstock.engine.kernels.paged_attention import Chunks, attend_chunks, queries_in_tile, write_rows
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.row_attention import attend_rows, suits_rows

TILE = ("slots", "starts", "firsts", "counts")  # of `Chunks`


class TritonAttention:
    """`engine.attention.base.AttentionBackend` for a `KVPool`. The block tables live on the device and get only what changed; after those
    of the slots comes one that stays empty, for rows that only fill up a CUDA graph.

    `deterministic`: a decode is a chunk of one token, so that the bits of a token do not depend on which it was, nor on how many programs
    would have shared its keys. `dtype` is that of the queries, if the pool's is another."""

    sorts_decodes = False
    fuses = True

    def __init__(
        self, pool: KVPool, layers: Sequence[LayerShape], slots: int, columns: int, *, dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        device = pool.stacks[0].device
        self.pool, self.deterministic = pool, deterministic
        self.table = torch.zeros((slots + 1, columns), dtype=torch.int32, device=device)
        self.kv_heads = max(layer.kv_heads for layer in layers)
        self.tickets = torch.zeros((slots + 1) * self.kv_heads, dtype=torch.int32, device=device)
        self.processors = processors_of(device)
        self.tiles = {
            queries_in_tile(layer.heads // layer.kv_heads, layer.head_dim, dtype or pool.dtype): None for layer in layers
        }  # an ordered set: how many queries a tile holds is all that layers differ in
        self.decodes: Decodes | None = None
        self.sampled: Decodes | None = None  # the tokens whose logits a step is to have, where those are not all, as decodes
        self.chunks: dict[int, Chunks] = {}
        self.places = self.table
        self._grid = (0, 0)  # decodes, and the longest of them
        self.prompt = False  # whether the step that was prepared last is one long prompt from its beginning
        self._as_prompt = False  # whether the one that was begun last is taken for one
        self.suits_prompt = not deterministic and all(suits_prompt(layer, dtype or pool.dtype, pool.dtype, device) for layer in layers)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.table.shape[1]) * self.pool.block_size

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        decodes = 0 if self.deterministic else rows.decodes
        self._grid = (decodes, int(rows.starts[:decodes].max()) + 1 if decodes else 0)
        self.prompt = self.suits_prompt and len(rows.slots) == 1 and int(rows.starts[0]) == 0 and int(rows.counts[0]) >= LONG
        sent: Columns = {"places": places, "decodes": np.array([decodes])}
        slots, columns = rows.written
        if len(slots):
            # An entry written twice by one plan gets its last value both times, so that the order on the device does not matter.
            sent |= {"table.at": slots.astype(np.int64) * rows.table.shape[1] + columns, "table.blocks": rows.table[slots, columns]}
        if decodes == len(rows.slots):
            return sent
        for queries in self.tiles:
            tiles = -(-rows.counts[decodes:] // queries)
            befores = np.repeat(np.cumsum(tiles) - tiles, tiles)
            row, offsets = np.repeat(np.arange(decodes, len(rows.slots)), tiles), (np.arange(len(befores)) - befores) * queries
            starts = rows.starts[row] + offsets
            longest = np.argsort(-starts, kind="stable")  # first: or one of them would run alone at the end
            tile = {
                "slots": rows.slots[row], "starts": starts, "firsts": rows.firsts[row] + offsets,
                "counts": np.minimum(rows.counts[row] - offsets, queries),
            }  # fmt: skip
            sent |= {f"tile.{name}.{queries}": column[longest] for name, column in tile.items()}
        return sent

    def lengths(self, tokens: int, rows: int, *, chunks: bool) -> dict[str, tuple[int, int]]:
        """The columns of `prepare`, but those of the table, of any step of so many tokens and rows at most: how long they can be, and what
        fills them up so that it does nothing."""
        found = {"places": (tokens, -1)}
        for queries in self.tiles if chunks or self.deterministic else ():
            most = tokens // queries + min(rows, tokens)
            found |= {f"tile.{name}.{queries}": (most, 0) for name in TILE}
        return found

    def write_table(self, columns: Mapping[str, Tensor]) -> None:
        """Follow the host's table, with the two columns of `prepare` that say how, if they are there."""
        if "table.at" in columns:
            self.table.view(-1).index_copy_(0, columns["table.at"], columns["table.blocks"].int())

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self.write_table(columns)
        self.begin_sized(columns, *self._grid)

    def begin_sized(self, columns: Mapping[str, Tensor], decodes: int, longest: int, *, prompt: bool = False) -> None:
        """`begin`, for up to so many decodes, which are the first tokens; `longest` only decides how many programs share one. `prompt`: the
        step is one prompt from its beginning, and what fills it up."""
        self._as_prompt = prompt
        self.places = columns["places"]
        decodes = 0 if self.deterministic else decodes
        splits = splits_for(decodes, self.kv_heads, self.processors, longest)
        self.decodes = (
            Decodes(columns["sources"], columns["positions"], self.table, columns["decodes"], decodes, splits) if decodes else None
        )
        self.sampled = None
        if not self.deterministic and "sample_tokens" in columns and len(columns["sample_tokens"]):
            self.sampled = self._as_decodes(columns["sample_slots"], columns["positions"].index_select(0, columns["sample_tokens"]))
        self.chunks = {
            queries: Chunks(table=self.table, **{name: columns[f"tile.{name}.{queries}"] for name in TILE})
            for queries in self.tiles
            if f"tile.counts.{queries}" in columns
        }

    def _as_decodes(self, slots: Tensor, starts: Tensor) -> Decodes:
        """Of slots at these positions; the last may be of the one that nobody has."""
        rows = len(slots)
        count = (slots != len(self.table) - 1).sum()
        return Decodes(slots, starts, self.table, count, rows, splits_for(rows, self.kv_heads, self.processors, self.longest))

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

    def attend_fused(
        self, layer: LayerAttention, qkv: Tensor, weights: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor, positions: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """From a layer's fused product `[tokens, (heads + 2 * kv_heads) * dim]` to `[tokens, heads, dim]`: norm and turn the heads, write
        keys and values, attend. See `engine.kernels.heads.turn_heads`. A step of decodes alone does it all in one launch. `rows` are the
        step's `sample_tokens`: then only these attend, each as a decode, to `[rows, heads, dim]`. Raises `CudaError`
        (`engine.kernels.row_attention`) and, for a long prompt, `RuntimeError`."""
        shape = layer.shape
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        pool = layer.keys, layer.values
        if rows is not None and self.sampled is not None:
            q = turn_heads(qkv, weights, epsilon, cos, sin, positions, self.places, *pool).index_select(0, rows)
            out = q.new_empty((len(q), shape.heads, shape.value_dim))
            attend_decodes(q, *pool, out, self.sampled, self.tickets, shape, None)
            return out
        if rows is not None:
            return self.attend_fused(layer, qkv, weights, epsilon, cos, sin, positions).index_select(0, rows)
        if self._as_prompt:
            k = heads.new_empty((len(heads), shape.kv_heads, shape.head_dim))
            q = turn_heads(qkv, weights, epsilon, cos, sin, positions, self.places, *pool, kept=k)
            return attend_prompt(q, k, heads[:, -shape.kv_heads :], shape.scaling)
        if self.chunks or self.decodes is None:
            q = turn_heads(qkv, weights, epsilon, cos, sin, positions, self.places, *pool, alike=self.deterministic)
            return self.attend_written(layer, q)
        out = heads.new_empty((len(heads), shape.heads, shape.value_dim))
        turns = Turns(weights, epsilon, cos, sin, self.places)
        if suits_rows(shape, turns, heads, layer.keys):
            attend_rows(heads, *pool, out, self.decodes, self.tickets, shape, turns)
        else:
            attend_decodes(heads, *pool, out, self.decodes, self.tickets, shape, None, turns)
        return out
