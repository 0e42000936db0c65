"""Adapters on disk as they lie in pages, ready to be copied to a device: safetensors, written once and then only read."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from penstock.engine.kernels.cache import made_apart
from penstock.engine.lora.errors import AdapterError


def write_pages(path: Path, data: Tensor, used: Tensor) -> None:
    """What `PageLayout.lay_out` gave. Whoever reads `path` finds all of it or nothing. Raises `OSError`."""
    from safetensors.torch import save_file

    with made_apart(path) as made:
        save_file({"data": data, "used": used}, made)


def read_pages(path: Path) -> tuple[Tensor, Tensor]:
    """The same, as views of the file. Raises `AdapterError` (missing_adapter, broken_adapter)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("data"), file.get_tensor("used")
    except FileNotFoundError as error:
        raise AdapterError("missing_adapter", f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise AdapterError("broken_adapter", f"{path}: {error}") from error
