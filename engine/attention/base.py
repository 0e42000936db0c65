"""The seam between a model and its paged attention: what a layer is, where its keys and values lie, and what a step tells a backend.

A sequence's token p lies in block `table[slot, p // block_size]` at offset `p % block_size`; blocks lie anywhere in the pool. In each
layer the keys and values of *all* rows of a step are written before any row attends, because a row may attend to prompt blocks that
another row of the same step fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.storage import raw

if TYPE_CHECKING:
    from penstock.engine.attention.triton import TritonAttention

Int32 = npt.NDArray[np.int32]
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The attention of one layer. `window`: a query sees the last `window` positions, its own included; None: all of them. `softcap`
    bounds the scores as `cap * tanh(score / cap)`. `sinks`: one more score a head, without a value."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.head_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The rows of a step on the host: decodes first, then prefill chunks. `table` is the block table of every slot, `[slots, columns]`;
    `written` are the slots and columns of the entries that changed since the step before."""

    slots: Int32
    starts: Int32
    counts: Int32
    decodes: int
    table: Int32
    written: tuple[Int32, Int32]

    @property
    def firsts(self) -> Int32:
        """Where each row's query tokens begin in the step's flat list, and the total at the end: `[rows + 1]`."""
        return np.concatenate((np.zeros(1, np.int32), np.cumsum(self.counts, dtype=np.int32)))

    def positions(self) -> Int32:
        """The position of each query token in its sequence: `[tokens]`."""
        if self.decodes == len(self.slots):
            return self.starts
        firsts = self.firsts
        shifts = np.repeat(self.starts - firsts[:-1], self.counts)
        return shifts + np.arange(firsts[-1], dtype=np.int32)

    def places(self, positions: Int32, block_size: int) -> Int32:
        """Where each query token's keys and values go, counted in tokens from the start of the pool: `[tokens]`."""
        slots = self.slots if self.decodes == len(self.slots) else np.repeat(self.slots, self.counts)
        columns, offsets = np.divmod(positions, np.int32(block_size))
        return self.table[slots, columns] * np.int32(block_size) + offsets


class AttentionBackend(Protocol):
    """One way to attend, and the step context that all layers share: `prepare` and `begin` run once a step, `attend` once a layer."""

    sorts_decodes: bool  # whether it likes decode rows in order of length
    fuses: bool  # whether it is Triton's: then other kernels may write keys and values for it

    def prepare(self, rows: StepRows, positions: Int32, places: Int32) -> Columns:
        """On the host: the columns that this backend needs on the device, whatever their names."""
        ...

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        """The columns have arrived: the step begins."""
        ...

    def attend(self, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Write k `[tokens, kv_heads, head_dim]` and v to the layer's pool, then attend with q `[tokens, heads, head_dim]`. Returns
        `[tokens, heads, value_dim]`."""
        ...


def can_fuse(backend: AttentionBackend) -> TypeGuard[TritonAttention]:
    """Whether other kernels may write keys and values for it."""
    return backend.fuses


class LayerAttention:
    """What hangs on one attention module: its shape, its part of the pool, and the backend that holds the step."""

    __slots__ = ("backend", "described", "keys", "shape", "values")

    def __init__(self, shape: LayerShape, keys: Tensor, values: Tensor, backend: AttentionBackend) -> None:
        self.shape, self.keys, self.values, self.backend = shape, keys, values, backend
        self.described: Any = None  # whatever the backend wants to keep of it

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """q `[1, heads, tokens, head_dim]`, k and v `[1, kv_heads, tokens, …]`, as transformers hands them over, to `[1, tokens, heads,
        value_dim]`."""
        return self.backend.attend(self, q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), sinks)[None]


class KVPool:
    """The keys and values of all layers: for each layer a key and a value tensor `[blocks, kv_heads, block_size, dim]`, so that what one
    head reads of a block lies together.

    `dtype` is the model's, or FP8 (`engine.attention.storage`). Layers of the same shape lie in one tensor. The memory is not
    initialised: what was never written must never be read.
    """

    def __init__(self, layers: Sequence[LayerShape], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.block_size, self.dtype = blocks, block_size, dtype
        kinds: dict[tuple[int, int], int] = {}
        places = []
        for layer in layers:
            pair = []
            for dim in (layer.head_dim, layer.value_dim):
                kind = (layer.kv_heads, dim)
                pair.append((kind, kinds.get(kind, 0)))
                kinds[kind] = kinds.get(kind, 0) + 1
            places.append(pair)
        stacks = {
            (heads, dim): torch.empty((count, blocks, heads, block_size, dim), dtype=dtype, device=device)
            for (heads, dim), count in kinds.items()
        }
        self.stacks = tuple(stacks.values())
        self.layers = [(stacks[k][i], stacks[v][j]) for (k, i), (v, j) in places]

    def fill(self, value: float) -> None:
        """Overwrite everything: for tests that prove that nothing unwritten is read."""
        for stack in self.stacks:
            stack.fill_(value)

    def clear(self, blocks: Tensor) -> None:
        """Zero these blocks (int64 indices) in every layer."""
        for stack in self.stacks:
            raw(stack).index_fill_(1, blocks, 0)


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers."""
    return block_size * sum(layer.bytes_per_token(dtype) for layer in layers)
