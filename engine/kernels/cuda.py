"""Kernels in CUDA C++, where Triton cannot say what must be said: compiled by NVRTC, which comes with torch, in a fraction of a second,
kept in a cache folder, and launched through the driver. A launch in a stream that is being captured becomes part of its graph."""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from ctypes import POINTER, byref, c_byte, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from penstock.engine.kernels.cache import cache_folder, made_apart

# The driver's numbers: for programmatic dependent launch, see `engine.kernels.overlap`; and of a function, how much shared memory it may be
# given at its launch, and how much of a multiprocessor's is to be there, in percent.
EARLY, MOST_SHARED, SHARED_SHARE = 6, 8, 9
HOPPER = (9, 0)  # compute capability of the tensor cores that warpgroup.cuh is for


class CudaError(RuntimeError):
    """What NVRTC or the driver said."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("padding", c_int), ("value", c_int), ("rest", c_byte * 60))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p), ("attributes", POINTER(_Attribute)),
        ("count", c_uint),
    )  # fmt: skip


class CudaKernel:
    """A compiled function on one device. `kinds` are the ctypes of its arguments; what they point to is trusted. `shared`: bytes of shared
    memory that a block is given beside what the function itself has."""

    def __init__(self, image: bytes, name: str, kinds: Iterable[Any], *, early: bool, shared: int = 0) -> None:
        self.kinds, self.shared = tuple(kinds), shared
        self.module, self.function = c_void_p(), c_void_p()
        check(driver().cuModuleLoadData(byref(self.module), image))
        check(driver().cuModuleGetFunction(byref(self.function), self.module, name.encode()))
        if shared:
            for attribute, value in ((MOST_SHARED, shared), (SHARED_SHARE, 100)):
                check(driver().cuFuncSetAttribute(self.function, attribute, value))
        self.attributes, self.count = (_Attribute * 1)(_Attribute(EARLY, 0, 1)), int(early)

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        """In torch's current stream. Raises `CudaError`."""
        values = [kind(argument) for kind, argument in zip(self.kinds, arguments, strict=True)]
        addresses = (c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        launch = _Launch((c_uint * 3)(blocks, 1, 1), (c_uint * 3)(threads, 1, 1), self.shared, stream, self.attributes, self.count)
        check(driver().cuLaunchKernelEx(byref(launch), self.function, addresses, None))


def load_kernel(
    source: Path, name: str, kinds: Iterable[Any], defines: Mapping[str, int], device: torch.device, shared: int = 0
) -> CudaKernel:
    """The function `name` of a file, compiled with these `defines` for `device`, now if it never was; it may include what is beside it.
    See `CudaKernel` for `shared`. Raises `CudaError`; `OSError` without NVRTC or a driver."""
    major, minor = torch.cuda.get_device_capability(device)
    target = f"sm_{major}{minor}{'a' if major >= 9 else ''}"  # with what later devices may not have
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{key}={value}" for key, value in sorted(defines.items()))]
    text, included = source.read_bytes(), [path.read_bytes() for path in sorted(source.parent.glob("*.cuh"))]
    library, version = _nvrtc()
    key = hashlib.sha256(repr((text, included, options, version)).encode()).hexdigest()[:16]
    file = f"{source.stem}-{key}.cubin"
    with torch.cuda.device(device):
        # No folder, none of our own, or a file that a machine which lost power left damaged: then it is compiled again.
        with suppress(OSError, CudaError):
            return CudaKernel((cache_folder() / file).read_bytes(), name, kinds, early=major >= 9, shared=shared)
        image = _compile(library, text, source.name, [*options, f"--include-path={source.parent}"])
        with suppress(OSError), made_apart(cache_folder() / file) as made:
            made.write_bytes(image)
        return CudaKernel(image, name, kinds, early=major >= 9, shared=shared)


def can_load(load: Callable[[], object], what: str) -> bool:
    """Whether `load` gets its kernels; else a warning says why not. `what`: who is slower then, with a verb."""
    try:
        load()
    except (CudaError, OSError) as error:
        warnings.warn(f"{what} slower: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True


def _compile(library: ctypes.CDLL, source: bytes, file: str, options: list[str]) -> bytes:
    program = c_void_p()
    _check_nvrtc(library, library.nvrtcCreateProgram(byref(program), source, file.encode(), 0, None, None))
    try:
        given = (c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise CudaError(_text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode(errors="replace"))
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _text(size_of: Any, get: Any, program: c_void_p) -> bytes:
    size = c_size_t()
    size_of(program, byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    return text.raw


def _check_nvrtc(library: ctypes.CDLL, code: int) -> None:
    if code:
        library.nvrtcGetErrorString.restype = c_char_p
        raise CudaError(library.nvrtcGetErrorString(code).decode())


def check(code: int) -> None:
    """Raises `CudaError` if the driver says that something went wrong."""
    if code:
        text = c_char_p()
        driver().cuGetErrorString(code, byref(text))
        raise CudaError((text.value or b"").decode() or f"CUDA error {code}")


@cache
def driver() -> ctypes.CDLL:
    """Raises `OSError` where there is none."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> tuple[ctypes.CDLL, tuple[int, int]]:
    """The library and its version: that of torch's own packages, or the system's. Raises `OSError`."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    file = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    for name in (*(str(path) for folder in folders for path in folder.glob(f"*/lib/{file}")), file, "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = c_int(), c_int()
        _check_nvrtc(library, library.nvrtcVersion(byref(major), byref(minor)))
        return library, (major.value, minor.value)
    raise OSError("libnvrtc, which comes with torch, was not found")
