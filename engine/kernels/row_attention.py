"""Attention of decodes as fast as keys and values can be read: what `engine.kernels.decode_attention` does with `Turns`, for the shapes
that most models have. How it works is in row_attention.cu beside this."""

from __future__ import annotations

from ctypes import c_float, c_int, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.attention.base import LayerShape
from penstock.engine.kernels.cuda import CudaKernel, can_load, load_kernel
from penstock.engine.kernels.decode_attention import MOST_SPLITS, Decodes, Turns
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.tensor_map import TensorMap, can_copy_boxes, map_boxes

SOURCE = Path(__file__).with_name("row_attention.cu")
KINDS = (*[TensorMap.from_buffer_copy] * 2, *[c_void_p] * 14, c_uint64, *[c_int] * 4, c_float, c_float)
DEFINES = ("HEADS", "KV_HEADS", "DIM", "SIZE", "PAIRS", "NORM", "WINDOW")
WARPS, BULK_WARPS = 8, 6  # that attend; in bulk they share out the ring evenly, and one more asks for keys and values
RING = 96 * 2**10  # bytes of keys and values that are on their way for a block: two stay on a multiprocessor
MANY = 64  # KV heads of all rows, from which copies in bulk are faster: with fewer it counts when the first come
DIMS = (64, 128)
LEAST, FULL = 8, 40  # units that a block has at least; and where it is to have many
LARGE, VERY_FEW = 4096, 16  # width of all heads, and blocks, see `split_for`
MOST_SHARED = 8  # query heads of one KV head
UNIT = 16  # keys that a warp takes at once; blocks of the pool hold a multiple of it


def suits_rows(shape: LayerShape, turns: Turns, heads: Tensor, keys: Tensor) -> bool:
    """Whether `attend_rows` can attend with these heads into such a pool."""
    plain = shape.softcap is None and not shape.sinks and shape.head_dim == shape.value_dim
    sized = shape.head_dim in DIMS and shape.heads // shape.kv_heads <= MOST_SHARED and keys.shape[2] % UNIT == 0
    kinds = {heads.dtype, keys.dtype, heads.dtype if turns.weights is None else turns.weights.dtype}
    if not (plain and sized and kinds == {torch.bfloat16} and keys.is_cuda):
        return False
    values = _values(shape, turns, keys)
    return all(_compiles(keys.device, bulk, *values) for bulk in {False, can_copy_boxes(keys.device)})


def _values(shape: LayerShape, turns: Turns, keys: Tensor) -> tuple[int, ...]:
    """Of `DEFINES`, in their order."""
    norm, window = int(turns.weights is not None), int(shape.window is not None)
    return shape.heads, shape.kv_heads, shape.head_dim, keys.shape[2], turns.cos.shape[1], norm, window


@cache
def _compiles(device: torch.device, bulk: bool, *values: int) -> bool:
    """Whether the kernel can be compiled for a device; else Triton's attend."""
    return can_load(lambda: _kernel(device, bulk, *values), "attention of decodes is")


@dataclass(frozen=True, slots=True)
class Split:
    """Among how many blocks to split the keys of a row at most; and there is one more only where those before have `least` units each."""

    most: int
    least: int


def split_for(shape: LayerShape, rows: int, processors: int) -> Split:
    """Measured best, or near it, at 576 keys and at 2,048: a block or two for each multiprocessor. A split of two is for long rows only. So
    it is where the products around are large, unless rows are the very fewest: blocks that are free read the next product's first
    weights meanwhile."""
    programs = max(1, rows * shape.kv_heads)
    most = processors // programs if programs <= processors // 4 else 2 * processors // programs
    short = most > 2 and (shape.heads * shape.head_dim < LARGE or programs <= VERY_FEW)
    return Split(max(1, min(MOST_SPLITS, most)), LEAST if short else FULL)


def attend_rows(
    qkv: Tensor, keys: Tensor, values: Tensor, out: Tensor, decodes: Decodes, tickets: Tensor, shape: LayerShape, turns: Turns
) -> None:
    """Attend with the first rows of the fused product qkv `[tokens, heads + 2 * kv_heads, head_dim]`, whose last two dimensions lie
    together, into the same of out `[tokens, heads, head_dim]`, contiguous; the newest keys and values are written to the pool. See
    `suits_rows`, and `attend_decodes`. Raises `CudaError` if the kernel cannot be compiled or launched."""
    heads, kv_heads, dim, rows = shape.heads, shape.kv_heads, shape.head_dim, decodes.rows
    bulk = copies_keys(rows * kv_heads, qkv.device)
    kernel = _kernel(qkv.device, bulk, *_values(shape, turns, keys))
    split = split_for(shape, rows, processors_of(qkv.device))
    parts = out if split.most == 1 else torch.empty(rows * heads * split.most * (dim + 2), dtype=torch.float32, device=qkv.device)
    columns = (qkv, keys, values, out, decodes.slots, decodes.starts, turns.places, decodes.table, decodes.count)
    boxes = [map_boxes(pool.view(-1, dim), UNIT) if bulk else TensorMap() for pool in (keys, values)]
    kernel.launch(
        rows * kv_heads * split.most, 32 * (BULK_WARPS + 1 if bulk else WARPS), *boxes, *(column.data_ptr() for column in columns),
        None if turns.weights is None else turns.weights.data_ptr(), turns.cos.data_ptr(), turns.sin.data_ptr(), parts.data_ptr(),
        tickets.data_ptr(), qkv.stride(0), decodes.table.shape[1], shape.window or 0, split.most, split.least, shape.scaling,
        turns.epsilon,
    )  # fmt: skip


def copies_keys(programs: int, device: torch.device) -> bool:
    """Whether to copy in bulk for so many KV heads of all rows."""
    return programs >= MANY and can_copy_boxes(device)


@cache
def _kernel(device: torch.device, bulk: bool, *values: int) -> CudaKernel:
    return load_kernel(SOURCE, "row_attention", KINDS, defines_for(bulk, *values), device, RING if bulk else 0)


def defines_for(bulk: bool, *values: int) -> dict[str, int]:
    """What the kernel is compiled with; `values` are of `DEFINES`."""
    defines = dict(zip(DEFINES, values, strict=True))
    ring = RING // (UNIT * defines["DIM"] * 4) if bulk else 0
    return {"WARPS": BULK_WARPS if bulk else WARPS, "RING": ring, **defines}
