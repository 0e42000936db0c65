"""Attention of prefill chunks as fast as tensor cores multiply: what `engine.kernels.paged_attention` does, for the shapes that most models
have. How it works is in chunk_attention.cu beside this."""

from __future__ import annotations

from ctypes import c_float, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.attention.base import LayerShape
from penstock.engine.kernels.cuda import HOPPER, CudaKernel, can_load, load_kernel
from penstock.engine.kernels.paged_attention import Chunks, queries_in_tile
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.tensor_map import TensorMap, map_boxes

SOURCE = Path(__file__).with_name("chunk_attention.cu")
KINDS = (*[TensorMap.from_buffer_copy] * 3, *[c_void_p] * 6, *[c_int] * 3, c_float)
DEFINES = ("HEADS", "KV_HEADS", "SIZE", "WINDOW")
DIM = 128  # of a head
ROWS, WARPGROUPS = 128, 2  # of a tile; that attend
KEYS, STAGES = 128, 2  # keys of a tile, and tiles that are on their way
AHEAD = 2  # tiles whose queries are there
UNIT = 16  # keys that are copied at once; blocks of the pool hold a multiple of it
BARRIER = 8  # bytes


def suits_chunks(shape: LayerShape, heads: Tensor, keys: Tensor) -> bool:
    """Whether `attend_tiles` can attend with these heads into such a pool."""
    plain = shape.softcap is None and not shape.sinks and shape.head_dim == shape.value_dim == DIM
    fits = plain and shape.heads // shape.kv_heads <= ROWS and keys.shape[2] % UNIT == 0
    if not (fits and heads.dtype == keys.dtype == torch.bfloat16 and keys.is_cuda):
        return False
    return _compiles(keys.device, *_values(shape, keys))


def _values(shape: LayerShape, keys: Tensor) -> tuple[int, ...]:
    """Of `DEFINES`, in their order."""
    return shape.heads, shape.kv_heads, keys.shape[2], int(shape.window is not None)


@cache
def _compiles(device: torch.device, *values: int) -> bool:
    """Whether the kernel can be compiled for a device, which must be of Hopper's kind; else Triton's attend."""
    return torch.cuda.get_device_capability(device) == HOPPER and can_load(lambda: _kernel(device, *values), "attention of prompts is")


def attend_tiles(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, chunks: Chunks, shape: LayerShape) -> Tensor:
    """Attend with q `[tokens, heads, head_dim]` into out, alike and contiguous: only the tokens of `chunks`, cut for tiles of `ROWS` rows.
    See `suits_chunks`. Returns out. Raises `CudaError` if the kernel cannot be compiled or launched."""
    shared = shape.heads // shape.kv_heads
    maps = map_boxes(q, shared, queries_in_tile(shared, DIM, q.dtype)), *(map_boxes(pool.view(-1, DIM), UNIT) for pool in (keys, values))
    columns = (out, chunks.slots, chunks.starts, chunks.firsts, chunks.counts, chunks.table)
    tiles = len(chunks.slots)
    blocks = min(processors_of(q.device), tiles * shape.kv_heads)
    _kernel(q.device, *_values(shape, keys)).launch(
        blocks, 128 * (WARPGROUPS + 1), *maps, *(column.data_ptr() for column in columns), chunks.table.shape[1], tiles,
        shape.window or 0, shape.scaling,
    )  # fmt: skip
    return out


@cache
def _kernel(device: torch.device, *values: int) -> CudaKernel:
    return load_kernel(SOURCE, "chunk_attention", KINDS, defines_for(*values), device, shared_bytes())


def shared_bytes() -> int:
    """Of a block: queries, keys and values, and two barriers for each of them."""
    row = 2 * DIM
    return AHEAD * (ROWS * row + 2 * BARRIER) + STAGES * 2 * (KEYS * row + 2 * BARRIER)


def defines_for(*values: int) -> dict[str, int]:
    """What the kernel is compiled with; `values` are of `DEFINES`."""
    return {"KEYS": KEYS, "STAGES": STAGES, **dict(zip(DEFINES, values, strict=True))}
