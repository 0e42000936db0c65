"""What the device's copy engine must know of a tensor to copy boxes of it into shared memory (bulk.cuh beside this)."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

from penstock.engine.kernels.cuda import check, driver

BOX = 64  # numbers of a row in a box: as in bulk.cuh
ALIGNED = 64  # bytes that the driver wants a map to begin at a multiple of
BFLOAT16, NO_INTERLEAVE, SWIZZLE_128, PROMOTE_128, ZEROS = 9, 0, 3, 2, 0  # the driver's numbers


class TensorMap(ctypes.Structure):
    """By value an argument of a kernel."""

    _fields_ = (("words", c_uint64 * 16),)


def can_copy_boxes(device: torch.device) -> bool:
    """Whether the device has such an engine."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def map_boxes(x: Tensor, rows: int) -> TensorMap:
    """Of x `[rows, columns]` or `[matrices, rows, columns]`, bfloat16, in boxes of so many rows, up to 256. A row's numbers lie together,
    and each row begins at a multiple of 16 bytes. Raises `CudaError`."""
    depth = x.dim()
    sizes = (c_uint64 * depth)(*reversed(x.shape))
    strides = (c_uint64 * (depth - 1))(*(stride * x.itemsize for stride in reversed(x.stride()[:-1])))
    box, steps = (c_uint32 * depth)(BOX, rows, *[1] * (depth - 2)), (c_uint32 * depth)(*[1] * depth)
    room = (c_uint64 * 24)()
    found = TensorMap.from_buffer(room, -ctypes.addressof(room) % ALIGNED)
    kinds = (NO_INTERLEAVE, SWIZZLE_128, PROMOTE_128, ZEROS)
    check(driver().cuTensorMapEncodeTiled(byref(found), BFLOAT16, depth, c_void_p(x.data_ptr()), sizes, strides, box, steps, *kinds))
    return found
