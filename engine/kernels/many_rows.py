"""The product of many rows with a weight, as fast as tensor cores multiply, and an activation and gate after it in the same launch. How it
works is in many_rows.cu beside this."""

from __future__ import annotations

from ctypes import c_int
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.kernels.cuda import HOPPER, CudaKernel, can_load, load_kernel
from penstock.engine.kernels.gate import ACTIVATIONS
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.tensor_map import BOX, TensorMap, map_boxes

SOURCE = Path(__file__).with_name("many_rows.cu")
KINDS = (*[TensorMap.from_buffer_copy] * 3, *[c_int] * 3)
WARPGROUPS, TILE_ROWS, TILE_COLUMNS = 2, 64, 256  # that multiply; rows of each, and columns
AT_ONCE = 128  # columns that a warpgroup writes at once
STAGES = 4
BEHIND = 2  # stages that the second warpgroup is behind the first
CLUSTER = 2  # blocks that share columns of the weight
BAND = 8  # clusters' rows that are at work together
ALIGNED = 8  # numbers: rows begin at multiples of 16 bytes
BARRIER = 8  # bytes


def suits_many(weight: Tensor) -> bool:
    """Whether `multiply_many` can multiply with a weight."""
    suits = weight.is_cuda and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % ALIGNED == 0
    return suits and _compiles(weight.device)


@cache
def _compiles(device: torch.device) -> bool:
    """Whether the kernel can be compiled for a device, which must be of Hopper's kind."""
    return torch.cuda.get_device_capability(device) == HOPPER and can_load(lambda: _kernel(device, -1), "products of many rows are")


def multiply_many(x: Tensor, weight: Tensor, activation: str | None = None) -> Tensor:
    """`x @ weight.T`; with an activation, that of its first half times the other, computed in float32.

    x `[rows, in]`, bfloat16, its rows' numbers side by side and each row at a multiple of 16 bytes; weight `[out, in]`, see `suits_many`.
    Returns `[rows, out]`, or half as wide. Raises `CudaError` if the kernel cannot be compiled or launched.
    """
    rows, inner = x.shape
    gated = activation is not None
    outs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((rows, outs), dtype=x.dtype, device=x.device)
    tile = WARPGROUPS * TILE_ROWS * CLUSTER
    tiles = -(-rows // tile) * -(-outs // (TILE_COLUMNS // 2 if gated else TILE_COLUMNS))
    blocks = CLUSTER * min(tiles, processors_of(x.device) // CLUSTER)
    maps = map_boxes(x, WARPGROUPS * TILE_ROWS), map_boxes(weight, TILE_COLUMNS // 2 // CLUSTER), map_boxes(out, TILE_ROWS)
    kind = -1 if activation is None else ACTIVATIONS.index(activation)
    _kernel(x.device, kind).launch(blocks, 128 * (WARPGROUPS + 1), *maps, rows, inner, outs)
    return out


@cache
def _kernel(device: torch.device, kind: int) -> CudaKernel:
    return load_kernel(SOURCE, "many_rows", KINDS, defines_for(kind), device, shared_bytes())


def shared_bytes() -> int:
    """Of a block: its stages, what it writes, and two barriers for each stage."""
    stage = (WARPGROUPS * TILE_ROWS + TILE_COLUMNS) * 2 * BOX
    return STAGES * (stage + 2 * BARRIER) + WARPGROUPS * TILE_ROWS * AT_ONCE * 2


def defines_for(kind: int) -> dict[str, int]:
    """What the kernel is compiled with."""
    return {"STAGES": STAGES, "BEHIND": BEHIND, "CLUSTER": CLUSTER, "BAND": BAND, "KIND": kind}
