"""Kernels in C for a CPU: compiled once for the machine they run on, kept in a cache folder, and called through ctypes.

They need a C compiler with OpenMP (GCC 12 or newer, or a clang that has it), as Triton does for a GPU. Without one, torch does the work,
and one stream on a CPU runs at little more than half the speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import warnings
from contextlib import suppress
from ctypes import POINTER, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.kernels.cache import cache_folder, made_apart

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
COMPILE_S = 120  # longest wait for the compiler: it takes a second
LANES, PANEL = 16, 64  # as in the source
MOST_DIM, MOST_GROUP, MOST_BLOCK = 256, 16, 32
MOST_SLICES = 3


class Layer(ctypes.Structure):
    """One layer's attention: see the source. The tensors behind the addresses are kept by who made it."""

    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p), ("heads", c_int64), ("kv_heads", c_int64), ("size", c_int64), ("dim", c_int64),
        ("window", c_int64), ("scale", c_float), ("cap", c_float),
    )  # fmt: skip


class Step(ctypes.Structure):
    """One step's rows: see the source."""

    _fields_ = (
        ("places", c_void_p), ("table", c_void_p), ("last", c_void_p), ("tokens", c_int64), ("rows", c_int64), ("columns", c_int64),
        ("threads", c_int64),
    )  # fmt: skip


class Pool(ctypes.Structure):
    """Pages of adapters: see the source, and `engine.lora.layout`."""

    _fields_ = (("data", c_void_p), ("page", c_int64), ("used", c_void_p), ("sites", c_int64))


class Group(ctypes.Structure):
    """Where a group of products lies in a page: see the source."""

    _fields_ = (
        ("a", c_int64), ("size", c_int64), ("slices", c_int64), ("site", c_int64), ("b", c_int64 * MOST_SLICES),
        ("outs", c_int64 * MOST_SLICES),
    )  # fmt: skip


class AdaptedStep(ctypes.Structure):
    """The pages of each token of a step: see the source."""

    _fields_ = (("firsts", c_void_p), ("counts", c_void_p), ("pages", c_void_p), ("tokens", c_int64), ("threads", c_int64))


class Kernels:
    """The compiled functions. Addresses and sizes are trusted."""

    __slots__ = ("_adapt", "_attend", "_multiply")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._multiply, self._attend, self._adapt = library.penstock_multiply, library.penstock_attend, library.penstock_adapt
        self._multiply.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64]
        self._attend.argtypes = [
            POINTER(Layer), POINTER(Step), c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p,
        ]  # fmt: skip
        self._adapt.argtypes = [POINTER(Pool), POINTER(Group), POINTER(AdaptedStep), c_void_p, c_int64, c_void_p, c_int64]
        self._multiply.restype = self._attend.restype = self._adapt.restype = None

    def multiply(self, x: Tensor, panels: int, depth: int, bias: int | None, out_features: int) -> Tensor:
        """x `[rows, in]` float32, rows without gaps inside, times a weight in panels at the address `panels`: `[rows, out_features]`."""
        rows, features = x.shape
        y = x.new_empty((rows, out_features))
        self._multiply(x.data_ptr(), x.stride(0), panels, depth, bias, y.data_ptr(), rows, features, out_features, torch.get_num_threads())
        return y

    def attend(self, layer: Layer, step: Step, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Store k and v `[tokens, kv_heads, dim]`, then attend with q `[tokens, heads, dim]` of the step's decode rows; the heads of a
        token lie side by side. Returns `[rows, heads, dim]`."""
        out = q.new_empty((step.rows, *q.shape[1:]))
        self._attend(
            layer, step, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def adapt(self, pool: Pool, group: Group, step: AdaptedStep, x: Tensor, y: Tensor) -> None:
        """Add to y `[tokens, sum(outs)]` what each token's adapter makes of x `[tokens, in]`; both float32, rows without gaps inside."""
        self._adapt(pool, group, step, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0))


@cache
def load_kernels() -> Kernels | None:
    """The kernels, compiled now if they never were on this machine; None, with a warning that says why, if that is not possible."""
    try:
        return open_kernels()
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or b""
        warnings.warn(f"no CPU kernels, so decoding is slower: {error} {detail.decode(errors='replace')[:2000]}", stacklevel=2)
        return None


def open_kernels() -> Kernels:
    """Raises whatever keeps them from being compiled or loaded."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc or clang)")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, os.path.realpath(compiler), _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / f"cpu-{key}.so"
    if library.is_file():
        with suppress(OSError, AttributeError):  # a machine that lost power may have left a damaged one
            return Kernels(ctypes.CDLL(str(library)))
    _compile(compiler, library)
    return Kernels(ctypes.CDLL(str(library)))


def _compile(compiler: str, library: Path) -> None:
    with made_apart(library) as made:
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_S)


def _processor() -> str:
    """What the compiler optimises for: a home folder may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
