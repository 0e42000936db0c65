"""Kernels in CUDA C++ where there is no GPU: compiled for the processor, with what is in `emulated` for what a warp does at once, and for
copies in bulk."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from penstock.engine.kernels import chunk_attention, few_rows, many_rows, row_attention
from penstock.engine.kernels.tensor_map import TensorMap

HEADERS, STANDARD = Path(__file__).with_name("emulated"), "standard.hpp"
OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-w")


@cache
def _headers() -> TemporaryDirectory[str]:
    """A folder of those that kernels include, the emulated in the place of others; the standard ones are compiled."""
    folder = TemporaryDirectory()
    for header in (*few_rows.SOURCE.parent.glob("*.cuh"), *HEADERS.iterdir()):
        shutil.copy(header, folder.name)
    standard = f"{folder.name}/{STANDARD}"
    subprocess.run(["g++", *OPTIONS, "-x", "c++-header", "-o", f"{standard}.gch", standard], check=True)
    return folder


class EmulatedKernel:
    """In the place of an `engine.kernels.cuda.CudaKernel`."""

    def __init__(self, source: Path, name: str, kinds: tuple[Callable[[Any], Any], ...], defines: Mapping[str, int]) -> None:
        with TemporaryDirectory() as folder:
            shutil.copy(source, f"{folder}/kernel.cu")
            Path(folder, "launch.cpp").write_text(
                f'#include "{STANDARD}"\n'
                '#include "kernel.cu"\n'
                'extern "C" int run(unsigned blocks, unsigned threads, void** values) '
                f"{{ return launch({name}, blocks, threads, {defines.get('CLUSTER', 1)}, values); }}\n"
            )
            options = [*OPTIONS, "-shared", "-I", _headers().name, *(f"-D{key}={value}" for key, value in defines.items())]
            subprocess.run(["g++", *options, "-o", f"{folder}/kernel.so", f"{folder}/launch.cpp"], check=True)
            self.library = ctypes.CDLL(f"{folder}/kernel.so")
        self.kinds = kinds

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        values = [kind(argument) for kind, argument in zip(self.kinds, arguments, strict=True)]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        if self.library.run(blocks, threads, addresses):
            raise RuntimeError("threads wait for some that never come, or for none of what they began")


@cache
def emulated(_: torch.device, cut: few_rows.Blocks, *values: int) -> EmulatedKernel:
    """In the place of `few_rows._kernel`."""
    return EmulatedKernel(few_rows.SOURCE, "few_rows", few_rows.KINDS, few_rows.defines_for(cut, *values))


@cache
def emulated_bulk(_: torch.device, cut: few_rows.Stages, *values: int) -> EmulatedKernel:
    """In the place of `few_rows._bulk_kernel`."""
    return EmulatedKernel(few_rows.BULK_SOURCE, "few_rows_bulk", few_rows.BULK_KINDS, few_rows.defines_for(cut, *values))


def emulated_boxes(x: torch.Tensor, rows: int, matrices: int = 1) -> TensorMap:
    """In the place of `engine.kernels.tensor_map.map_boxes`: see emulated/bulk.cuh."""
    sizes, strides = [1] * (3 - x.dim()) + list(x.shape), [0] * (3 - x.dim()) + list(x.stride())
    words = (x.data_ptr(), *reversed(sizes), 2 * strides[1], 2 * strides[0], rows, matrices)
    return TensorMap((ctypes.c_uint64 * 16)(*words))


@cache
def emulated_rows(_: torch.device, bulk: bool, *values: int) -> EmulatedKernel:
    """In the place of `row_attention._kernel`."""
    return EmulatedKernel(row_attention.SOURCE, "row_attention", row_attention.KINDS, row_attention.defines_for(bulk, *values))


@cache
def emulated_many(_: torch.device, kind: int) -> EmulatedKernel:
    """In the place of `many_rows._kernel`."""
    return EmulatedKernel(many_rows.SOURCE, "many_rows", many_rows.KINDS, many_rows.defines_for(kind))


@cache
def emulated_chunks(_: torch.device, *values: int) -> EmulatedKernel:
    """In the place of `chunk_attention._kernel`."""
    return EmulatedKernel(chunk_attention.SOURCE, "chunk_attention", chunk_attention.KINDS, chunk_attention.defines_for(*values))
