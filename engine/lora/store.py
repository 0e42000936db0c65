"""Adapters on disk as they lie in pages, ready to be copied to a device: safetensors, written once and then only read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.kernels.cache import made_apart
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.layout import Bytes, PageLayout
from penstock.engine.lora.read import Lora

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them


def write_pages(path: Path, layout: PageLayout, lora: Lora, dtype: torch.dtype) -> None:
    """An adapter's `PageLayout.pieces` in their places. Whoever reads `path` finds all of it or nothing. Raises `OSError`.

    Matrix by matrix: to lay out all of it in memory would take longer, since none of that memory was there before.
    """
    used = layout.used(lora.weights)
    page = layout.elements * dtype.itemsize
    end = len(used) * page
    header: dict[str, Any] = {
        "__metadata__": {"rank": str(lora.rank)},
        "data": {"dtype": DTYPES[dtype], "shape": [len(used), layout.elements], "data_offsets": [0, end]},
        "used": {"dtype": "I32", "shape": list(used.shape), "data_offsets": [end, end + used.nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    with made_apart(path) as made, made.open("wb", buffering=0) as file:
        _write(file.fileno(), start, 0)
        for number, at, rows in layout.pieces(lora.weights, lora.scales, dtype):
            _write(file.fileno(), rows.data, len(start) + number * page + at)
        _write(file.fileno(), used.numpy().data, len(start) + end)  # what lies between is zero


def _write(file: int, content: bytes | memoryview, at: int) -> None:
    """All of it: where a disk is nearly full, one call may take a part only."""
    left = memoryview(content).cast("B")
    while left:
        taken = os.pwrite(file, left, at)
        left, at = left[taken:], at + taken


def read_size(path: Path) -> tuple[int, int]:
    """How many pages there are, and the adapter's rank. Raises `AdapterError` and `OSError`."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return int(file.get_slice("data").get_shape()[0]), int((file.metadata() or {})["rank"])


def read_pages(path: Path) -> tuple[Tensor, Tensor]:
    """Its pages `[pages, elements]`, and how many rank rows each site has in each, as views of the file. Raises `AdapterError`
    (missing_adapter, broken_adapter) and `OSError`."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return file.get_tensor("data"), file.get_tensor("used")


class PageFile:
    """A file of pages, to be read part by part, by several threads at once: where memory is mapped, each 4 KiB of it are asked for by
    themselves. What is in it `read_pages` checks."""

    def __init__(self, path: Path) -> None:
        with _reading(path), ExitStack() as stack:
            self._path, self._file = path, stack.enter_context(path.open("rb", buffering=0))
            self._begin = _begin_of_data(self._file)
            stack.pop_all()  # it stays open

    def read(self, into: Sequence[Bytes], at: int) -> None:
        """Fill arrays one after another, from byte `at` of the pages. Raises `AdapterError` (broken_adapter) and `OSError`."""
        with _reading(self._path):
            left, at = [part.data for part in into if len(part)], self._begin + at
            while left:
                taken = os.preadv(self._file.fileno(), left, at)
                if not taken:
                    raise ValueError(f"it ends after {at} bytes")
                at += taken
                while left and taken >= len(left[0]):
                    taken -= len(left.pop(0))
                if taken:
                    left[0] = left[0][taken:]

    def close(self) -> None:
        self._file.close()


def _begin_of_data(file: FileIO) -> int:
    """As the header says: in files that safetensors laid out itself `used` lies first."""
    length = struct.unpack("<Q", file.read(8))[0]
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError(f"it ends before its header of {length} bytes")
    return int(8 + length + json.loads(file.read(length))["data"]["data_offsets"][0])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is wrong with the file is an `AdapterError`. That it cannot be read now, for want of descriptors say, stays an `OSError`."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        if path.exists():  # safetensors says that of any file that it cannot open
            raise OSError(f"{path} cannot be opened") from error
        raise AdapterError("missing_adapter", f"{path}: there is no such file") from error
    except (SafetensorError, LookupError, TypeError, ValueError, struct.error) as error:
        raise AdapterError("broken_adapter", f"{path}: {error}") from error
