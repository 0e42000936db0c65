"""The product of a few rows with a weight, which is as fast as the weight can be read, and what comes before and after it in the same
launch: a norm of the rows, an activation and gate, a residual sum. How it works is in few_rows.cu beside this."""

from __future__ import annotations

import ctypes
import warnings
from ctypes import c_float, c_int, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.kernels.cuda import CudaError, CudaKernel, load_kernel
from penstock.engine.kernels.gate import ACTIVATIONS
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.tiles import Tiles
from penstock.engine.lora.layout import PagePool, Place
from penstock.engine.model.norm import Norm

SOURCE = Path(__file__).with_name("few_rows.cu")


class Shrink(ctypes.Structure):
    """What adapters add begins with the product: see few_rows.cu, which has the same."""

    _fields_ = (
        *((name, c_void_p) for name in ("data", "used", "tokens", "jobs", "tiles", "sums")), ("page_size", c_uint64), ("a", c_uint64),
        *((name, c_int) for name in ("site", "sites", "slices")),
    )  # fmt: skip


KINDS = (*[c_void_p] * 6, c_uint64, c_int, c_int, c_int, c_float, Shrink.from_buffer_copy)
CHUNK = 32  # of the inner dimension, which must be a multiple of it
COLUMNS = 16  # of a group
LONG = 2048  # inner dimension from which a block has more warps
# With more rows than this, what is read of them is no longer little beside the weight, and the library is faster: at once where the inner
# dimension is long.
FEW, MORE, NARROW = 8, 32, 4096


def suits_few(weight: Tensor) -> bool:
    """Whether `multiply_few` can multiply with a weight."""
    suits = weight.is_cuda and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % CHUNK == 0
    return suits and _compiles(weight.device)


@cache
def _compiles(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device; a warning says why not. Then its products are the library's."""
    try:
        _kernel(device, Blocks(8, 1), 1, 0, -1, False, False, False)
    except (CudaError, OSError) as error:
        warnings.warn(f"steps of few rows are slower: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def is_few(rows: int, widest: int) -> bool:
    """Whether `multiply_few` is the way for so many rows, if the longest inner dimension is `widest`."""
    return rows <= FEW or (rows <= MORE and widest <= NARROW)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut: warps of a block, and groups of `COLUMNS` columns of the weight that it has."""

    warps: int
    groups: int


def blocks_for(inner: int, columns: int, processors: int) -> Blocks:
    """For a weight of so many columns. Two blocks of 8 warps stay on a multiprocessor; if there are more, they have more columns each."""
    return Blocks(16, 1) if inner >= LONG else Blocks(8, 1 if columns <= 2 * COLUMNS * processors else 2)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """What adapters add to one product, to be begun with it: what `engine.kernels.shrink` does, in one split, for tiles of `SMALL`
    tokens."""

    pool: PagePool
    place: Place
    step: Tiles

    @property
    def blocks(self) -> int:
        return self.step.cut.jobs * len(self.place.group)

    def to_c(self) -> Shrink:
        pool, place, step = self.pool, self.place, self.step
        columns = (pool.data, pool.used, step.tokens, step.jobs, step.tiles, step.sums)
        strides = (pool.data.stride(0), place.a, place.site, pool.used.stride(0))
        return Shrink(*(column.data_ptr() for column in columns), *strides, len(place.group))


def multiply_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None = None, add: Tensor | None = None, activation: str | None = None,
    shrink: Begun | None = None,
) -> Tensor:  # fmt: skip
    """`norm(x) @ weight.T + bias`, then one of these: plus `add`; or the activation of its first half times the other; and what `shrink`
    says of `norm(x)`, with no activation then.

    x `[rows, in]` with its rows' numbers side by side, up to `MORE` rows, bfloat16; weight `[out, in]`, see `suits_few`; add
    `[rows, out]`, contiguous. Returns `[rows, out]`, or half as wide. Raises `CudaError` if the kernel cannot be compiled or launched.
    """
    rows, inner = x.shape
    outer = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((rows, outer), dtype=x.dtype, device=x.device)
    cut = blocks_for(inner, weight.shape[0], processors_of(x.device))
    kernel = _kernel(
        x.device, cut, 1 if rows <= 8 else 2 if rows <= 16 else 4,
        0 if norm is None else 1 if norm.weight.dtype == x.dtype else 2, -1 if activation is None else ACTIVATIONS.index(activation),
        bias is not None, add is not None, shrink is not None,
    )  # fmt: skip
    kernel.launch(
        -(-weight.shape[0] // (COLUMNS * cut.groups)) + (0 if shrink is None else shrink.blocks), 32 * cut.warps,
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), None if norm is None else norm.weight.data_ptr(),
        None if add is None else add.data_ptr(), out.data_ptr(), x.stride(0), rows, inner, outer, 0.0 if norm is None else norm.epsilon,
        Shrink() if shrink is None else shrink.to_c(),
    )  # fmt: skip
    return out


@cache
def _kernel(device: torch.device, cut: Blocks, tiles: int, norm: int, kind: int, bias: bool, add: bool, adapted: bool) -> CudaKernel:
    defines = {"WARPS": cut.warps, "GROUPS": cut.groups, "TILES": tiles, "NORM": norm, "KIND": kind}
    return load_kernel(SOURCE, "few_rows", KINDS, defines | {"BIAS": int(bias), "ADD": int(add), "ADAPTED": int(adapted)}, device)
