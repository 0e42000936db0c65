"""What the device's copy engine must know of a tensor to copy boxes of it into shared memory (bulk.cuh beside this)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_uint32, c_uint64, c_void_p
from functools import cache, lru_cache

import torch
from torch import Tensor

from penstock.engine.kernels.cuda import check, driver

BOX = 64  # numbers of a row in a box: as in bulk.cuh
ALIGNED = 64  # bytes that the driver wants a map to begin at a multiple of
ROOM = 228 * 2**10  # bytes of shared memory that a multiprocessor must have: Hopper's, where two blocks of 113 KiB stay
KEPT = 4096  # maps: of weights there are a few hundred, and what else lies in the pool of a graph is asked for again
BFLOAT16, NO_INTERLEAVE, SWIZZLE_128, PROMOTE_128, ZEROS = 9, 0, 3, 2, 0  # the driver's numbers


class TensorMap(ctypes.Structure):
    """By value an argument of a kernel."""

    _fields_ = (("words", c_uint64 * 16),)


@cache
def can_copy_boxes(device: torch.device) -> bool:
    """Whether the device has such an engine, and room for what is on its way."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and properties.shared_memory_per_multiprocessor >= ROOM


def map_boxes(x: Tensor, rows: int, matrices: int = 1) -> TensorMap:
    """Of x `[rows, columns]` or `[matrices, rows, columns]`, bfloat16, in boxes of so many rows of so many matrices, each up to 256. A
    row's numbers lie together, and each row begins at an address that is a multiple of 16. Raises `CudaError`."""
    return _map(x.data_ptr(), x.shape[::-1], x.stride()[-2::-1], (BOX, rows, matrices)[: x.dim()])


@lru_cache(maxsize=KEPT)
def _map(address: int, shape: Sequence[int], steps_between: Sequence[int], of_box: Sequence[int]) -> TensorMap:
    """Innermost first; steps are counted in numbers."""
    depth = len(shape)
    sizes, strides = (c_uint64 * depth)(*shape), (c_uint64 * (depth - 1))(*(2 * step for step in steps_between))
    box, steps = (c_uint32 * depth)(*of_box), (c_uint32 * depth)(*[1] * depth)
    room = (c_uint64 * 24)()
    found = TensorMap.from_buffer(room, -ctypes.addressof(room) % ALIGNED)
    kinds = (NO_INTERLEAVE, SWIZZLE_128, PROMOTE_128, ZEROS)
    check(driver().cuTensorMapEncodeTiled(byref(found), BFLOAT16, depth, c_void_p(address), sizes, strides, box, steps, *kinds))
    return found
