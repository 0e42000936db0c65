"""Kernels in CUDA C++ where there is no GPU: compiled for the processor, with emulated/warp.cuh for what a warp does at once."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from penstock.engine.kernels import few_rows, row_attention

HEADER = Path(__file__).with_name("emulated") / "warp.cuh"
NAMES = ("TILES", "NORM", "KIND", "BIAS", "ADD", "ADAPTED")


class EmulatedKernel:
    """In the place of an `engine.kernels.cuda.CudaKernel`."""

    def __init__(self, source: Path, name: str, kinds: tuple[Callable[[Any], Any], ...], defines: Mapping[str, int]) -> None:
        folder = Path(mkdtemp())
        try:
            shutil.copy(source, folder / "kernel.cu")
            shutil.copy(HEADER, folder / HEADER.name)
            (folder / "launch.cpp").write_text(
                '#include "kernel.cu"\n'
                'extern "C" int run(unsigned blocks, unsigned threads, void** values) '
                f"{{ return launch({name}, blocks, threads, values); }}\n"
            )
            options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", *(f"-D{key}={value}" for key, value in defines.items())]
            subprocess.run(["g++", *options, "-o", folder / "kernel.so", folder / "launch.cpp"], check=True)
            self.library = ctypes.CDLL(str(folder / "kernel.so"))
        finally:
            shutil.rmtree(folder)
        self.kinds = kinds

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        values = [kind(argument) for kind, argument in zip(self.kinds, arguments, strict=True)]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        if self.library.run(blocks, threads, addresses):
            raise RuntimeError("threads wait for some that never come")


@cache
def emulated(_: torch.device, cut: few_rows.Blocks, *values: int) -> EmulatedKernel:
    """In the place of `few_rows._kernel`."""
    defines = {"WARPS": cut.warps, "GROUPS": cut.groups, **dict(zip(NAMES, map(int, values), strict=True))}
    return EmulatedKernel(few_rows.SOURCE, "few_rows", few_rows.KINDS, defines)


@cache
def emulated_rows(_: torch.device, *values: int) -> EmulatedKernel:
    """In the place of `row_attention._kernel`."""
    defines = {"WARPS": row_attention.WARPS, **dict(zip(row_attention.DEFINES, values, strict=True))}
    return EmulatedKernel(row_attention.SOURCE, "row_attention", row_attention.KINDS, defines)
