"""Decode attention on a CPU without a gather: a kernel of our own reads the pool where it lies.

A decode reads each key and value once, so copying them together first would cost more than the attention itself. Prefill chunks go as in
`gather`, where each key serves many queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.kernels.cpu import LANES, MOST_BLOCK, MOST_DIM, MOST_GROUP, Kernels, Layer, Step


def suits(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel can do these layers."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and block_size <= MOST_BLOCK
        and block_size % LANES == 0
        and all(
            layer.head_dim == layer.value_dim
            and layer.head_dim % LANES == 0
            and layer.head_dim <= MOST_DIM
            and layer.heads <= MOST_GROUP * layer.kv_heads
            and layer.heads % layer.kv_heads == 0
            for layer in layers
        )
    )


class InPlaceAttention(GatherAttention):
    """`GatherAttention` with stores and decodes by the kernel. For float32 on a CPU."""

    sorts_decodes = False

    def __init__(self, pool: KVPool, layers: Sequence[LayerShape], kernels: Kernels) -> None:
        if not suits(layers, pool.block_size, pool.stacks[0].dtype, pool.stacks[0].device):
            raise ValueError("attention='inplace': the kernel cannot do these layers")
        super().__init__(pool, layers)
        self.kernels = kernels
        self.step = Step()
        self.held: tuple[object, ...] = ()  # what the step's addresses point to

    def _reads_blocks(self, rows: StepRows) -> bool:
        """Only prefill chunks do, and none reads a block that a decode left half full."""
        return len(rows.slots) > rows.decodes

    def _prepare_decodes(self, rows: StepRows, places: Int32, columns: Columns) -> None:
        last = np.ascontiguousarray(rows.starts[: rows.decodes])
        most = int(last.max()) // self.block_size + 1 if len(last) else 0
        table = np.ascontiguousarray(rows.table[rows.slots[: rows.decodes], :most])
        wide = places.astype(np.int64)
        self.held = (wide, table, last)
        self.step = Step(
            wide.ctypes.data, table.ctypes.data, last.ctypes.data, len(wide), rows.decodes, most, torch.get_num_threads()
        )  # fmt: skip

    def _attend_decodes(self, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> list[Tensor]:
        sinks = None if sinks is None else sinks.to(q.dtype).contiguous()
        seen = self.kernels.attend(self._describe(layer), self.step, _side_by_side(q), _side_by_side(k), _side_by_side(v), sinks)
        return [seen] if len(seen) else []

    def _describe(self, layer: LayerAttention) -> Layer:
        found: Layer | None = layer.described
        if found is None:
            shape = layer.shape
            found = layer.described = Layer(
                layer.keys.data_ptr(), layer.values.data_ptr(), shape.heads, shape.kv_heads, self.block_size, shape.head_dim,
                shape.window or 0, shape.scaling, shape.softcap or 0.0,
            )  # fmt: skip
        return found


class TokenAttention(InPlaceAttention):
    """The kernel for every token, those of chunks too, each a row of its own: its bits depend on its sequence alone. Slower for prefills,
    where a key is read again for each query."""

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        slots, ones = np.repeat(rows.slots, rows.counts), np.ones_like(positions)
        return super().prepare(StepRows(slots, positions, ones, len(positions), rows.table, rows.written), positions, places)


def _side_by_side(x: Tensor) -> Tensor:
    """x `[tokens, heads, dim]` with the heads of a token side by side, as the kernel wants them; copied only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
