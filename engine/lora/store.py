"""Adapters on disk as they lie in pages, ready to be copied to a device: safetensors, written once and then only read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from penstock.engine.kernels.cache import made_apart
from penstock.engine.lora.errors import AdapterError


def write_pages(path: Path, data: Tensor, used: Tensor, rank: int) -> None:
    """What `PageLayout.lay_out` gave of an adapter of this rank. Whoever reads `path` finds all of it or nothing. Raises `OSError`."""
    from safetensors.torch import save_file

    with made_apart(path) as made:
        save_file({"data": data, "used": used}, made, metadata={"rank": str(rank)})


def read_size(path: Path) -> tuple[int, int]:
    """How many pages there are, and the adapter's rank. Raises `AdapterError`."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return int(file.get_slice("data").get_shape()[0]), int((file.metadata() or {})["rank"])


def read_pages(path: Path) -> tuple[Tensor, Tensor]:
    """The same, as views of the file. Raises `AdapterError` (missing_adapter, broken_adapter)."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return file.get_tensor("data"), file.get_tensor("used")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise AdapterError("missing_adapter", f"{path}: there is no such file") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise AdapterError("broken_adapter", f"{path}: {error}") from error
