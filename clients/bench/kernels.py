"""`penstock bench kernels`: each kernel of the engine alone, beside the least that the device would need for the same work."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from penstock.clients.bench.apart import run_apart
from penstock.clients.bench.shapes import SHAPES, write_model
from penstock.clients.errors import InvalidRequest

COLUMNS = {  # how a table shows them
    "kernel": ("kernel", "{}"), "shape": ("shape", "{}"), "rows": ("rows", "{:,}"), "us": ("µs", "{:,.2f}"),
    "floor_us": ("floor, µs", "{:,.2f}"), "of_floor": ("of floor", "{:.1%}"), "tb_per_s": ("TB/s", "{:.3f}"),
    "tflop_per_s": ("TFLOP/s", "{:,.2f}"),
}  # fmt: skip


def kernels(model: str, rows: list[str], keys: int, dtype: str, device: str, kv_dtype: str = "auto") -> dict[str, Any]:
    """`ceilings`, what the device was seen to give at most, and `rows`, one for each kernel and size: microseconds (median), the floor,
    its share of the time, and what was moved and computed a second. `model` is a shape or a folder; `rows` are numbers, or several
    separated by commas. Raises `InvalidRequest`, `PenstockError`."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        source = str(write_model(model, Path(folder))) if model in SHAPES else model
        order = {"model": source, "rows": _numbers(rows), "keys": keys, "dtype": dtype, "device": device, "kv_dtype": kv_dtype}
        return {"model": model, "keys": keys, **run_apart("engine.bench", json.dumps(order))}


def _numbers(texts: list[str]) -> list[int]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= 65_536:
            raise InvalidRequest(f"rows={part!r}: must be from 1 to 65536", field="rows", value=part, limit="from 1 to 65536")
    return list(dict.fromkeys(map(int, parts)))
