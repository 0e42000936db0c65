"""The product of a few rows with a weight, which is as fast as the weight can be read, and what comes before and after it in the same
launch: a norm of the rows, an activation and gate, a residual sum. How it works is in few_rows.cu beside this; and where a weight is large
and the device copies in bulk, in few_rows_bulk.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_float, c_int, c_uint64, c_void_p
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.kernels.cuda import CudaKernel, can_load, load_kernel
from penstock.engine.kernels.gate import ACTIVATIONS
from penstock.engine.kernels.processors import processors_of
from penstock.engine.kernels.tensor_map import BOX, TensorMap, can_copy_boxes, map_boxes
from penstock.engine.kernels.tiles import Tiles
from penstock.engine.lora.layout import RANKS, PagePool, Place
from penstock.engine.model.norm import Norm

SOURCE, BULK_SOURCE = (Path(__file__).with_name(name) for name in ("few_rows.cu", "few_rows_bulk.cu"))


class Shrink(ctypes.Structure):
    """What adapters add begins with the product: see few_rows.cuh, which has the same."""

    _fields_ = (
        *((name, c_void_p) for name in ("data", "used", "tokens", "jobs", "tiles", "sums")), ("page_size", c_uint64), ("a", c_uint64),
        *((name, c_int) for name in ("site", "sites", "slices")),
    )  # fmt: skip


KINDS = (*[c_void_p] * 6, c_uint64, c_int, c_int, c_int, c_float, Shrink.from_buffer_copy)
BULK_KINDS = (*[TensorMap.from_buffer_copy] * 3, *[c_void_p] * 4, c_int, c_int, c_int, c_float, Shrink.from_buffer_copy)
DEFINES = ("TILES", "NORM", "KIND", "BIAS", "ADD", "ADAPTED")
CHUNK = 32  # of the inner dimension, which must be a multiple of it
COLUMNS = 16  # of a group
LONG = 2048  # inner dimension from which a block has more warps
LARGE = 2**24  # bytes of a weight from which bulk copies are faster
BULK_WARPS = 8
MOST_GROUPS = 7
SHARED = 112 * 2**10  # bytes of a block's stages: two blocks stay on a multiprocessor
# With more rows than this the library is faster: as few_rows.cu does it, what is read of them is no longer little beside the weight, at
# once where the inner dimension is long. With bulk copies they are read less often.
FEW, MORE, NARROW, BULK_FEW = 8, 32, 4096, 16


def suits_few(weight: Tensor) -> bool:
    """Whether `multiply_few` can multiply with a weight."""
    suits = weight.is_cuda and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % CHUNK == 0
    return suits and _compiles(weight.device)


@cache
def _compiles(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device; else its products are the library's."""

    def load() -> None:
        _kernel(device, Blocks(8, 1), 1, 0, -1, 0, 0, 0)
        if can_copy_boxes(device):
            _bulk_kernel(device, stages_for(LARGE, 1, processors_of(device)), 1, 0, -1, 0, 0, 0)

    return can_load(load, "steps of few rows are")


def most_rows(shapes: Iterable[Sequence[int]], device: torch.device) -> int:
    """Up to how many rows `multiply_few` is the way for weights of these shapes, in one step."""
    long = [shape for shape in shapes if shape[1] > NARROW]
    if not long:
        return MORE
    return BULK_FEW if can_copy_boxes(device) and all(2 * outer * inner >= LARGE for outer, inner in long) else FEW


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut: warps of a block, and groups of `COLUMNS` columns of the weight that it has."""

    warps: int
    groups: int


def blocks_for(inner: int, columns: int, processors: int) -> Blocks:
    """For a weight of so many columns. Two blocks of 8 warps stay on a multiprocessor; if there are more, they have more columns each."""
    return Blocks(16, 1) if inner >= LONG else Blocks(8, 1 if columns <= 2 * COLUMNS * processors else 2)


@dataclass(frozen=True, slots=True)
class Stages:
    """How a product with bulk copies is cut: warps of a block along the inner dimension and across columns, groups of columns that it has,
    and stages, each of a box for every warp along the inner dimension."""

    along: int
    across: int
    groups: int
    stages: int

    def shared(self, tiles: int) -> int:
        """Bytes of the stages."""
        return self.stages * _stage_bytes(self.along, self.groups, tiles)


@cache
def stages_for(columns: int, tiles: int, processors: int) -> Stages:
    """For a weight of so many columns: two blocks for each multiprocessor, as full as can be. A stage of about 32 KiB was measured best, or
    near it, for the products of an 8B Llama."""
    together = 2 * COLUMNS * processors
    groups = min(range(MOST_GROUPS, 0, -1), key=lambda groups: -(-columns // (together * groups)) * groups)
    along = 8 if groups <= 2 else 4 if groups <= 4 else 2
    return Stages(along, BULK_WARPS // along, groups, SHARED // _stage_bytes(along, groups, tiles))


def _stage_bytes(along: int, groups: int, tiles: int) -> int:
    return along * (COLUMNS * groups + 8 * tiles) * 2 * BOX


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

    def map(self) -> TensorMap:
        """A of all pages, in boxes of one slice."""
        data, inner = self.pool.data, self.place.in_features
        rows = RANKS * len(self.place.group)
        return map_boxes(data.as_strided((len(data), rows, inner), (data.stride(0), inner, 1), self.place.a), RANKS)


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
    tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    values = (
        tiles, 0 if norm is None else 1 if norm.weight.dtype == x.dtype else 2, -1 if activation is None else ACTIVATIONS.index(activation),
        int(bias is not None), int(add is not None), int(shrink is not None),
    )  # fmt: skip
    around = (None if bias is None else bias.data_ptr(), None if norm is None else norm.weight.data_ptr())
    written = (None if add is None else add.data_ptr(), out.data_ptr())
    sizes = (rows, inner, outer, 0.0 if norm is None else norm.epsilon, Shrink() if shrink is None else shrink.to_c())
    more, processors = 0 if shrink is None else shrink.blocks, processors_of(x.device)
    if copies_weight(x, weight):
        stages = stages_for(weight.shape[0], tiles, processors)
        columns = COLUMNS * stages.groups
        maps = (map_boxes(x, 8 * tiles), map_boxes(weight, columns if activation is None else columns // 2))
        _bulk_kernel(x.device, stages, *values).launch(
            -(-weight.shape[0] // columns) + more, 32 * (stages.along * stages.across + 1),
            *maps, TensorMap() if shrink is None else shrink.map(), *around, *written, *sizes,
        )  # fmt: skip
    else:
        cut = blocks_for(inner, weight.shape[0], processors)
        _kernel(x.device, cut, *values).launch(
            -(-weight.shape[0] // (COLUMNS * cut.groups)) + more, 32 * cut.warps, x.data_ptr(), weight.data_ptr(), *around, *written,
            x.stride(0), *sizes,
        )  # fmt: skip
    return out


def copies_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether bulk copies are possible, and the faster way."""
    return weight.nbytes >= LARGE and len(x) <= BULK_FEW and x.stride(0) % 8 == 0 and can_copy_boxes(x.device)


@cache
def _kernel(device: torch.device, cut: Blocks, *values: int) -> CudaKernel:
    return load_kernel(SOURCE, "few_rows", KINDS, defines_for(cut, *values), device)


@cache
def _bulk_kernel(device: torch.device, cut: Stages, tiles: int, *values: int) -> CudaKernel:
    return load_kernel(BULK_SOURCE, "few_rows_bulk", BULK_KINDS, defines_for(cut, tiles, *values), device, cut.shared(tiles))


def defines_for(cut: Blocks | Stages, *values: int) -> dict[str, int]:
    """What a kernel is compiled with: the names of `cut`, and `DEFINES`."""
    sizes = {field.name.upper(): getattr(cut, field.name) for field in fields(cut)}
    return sizes | dict(zip(DEFINES, values, strict=True))
