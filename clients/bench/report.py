"""What a bench prints: a table for people, one JSON object on the last line for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

NESTED = ("against", "profile", "ceilings")  # figures that are maps of some more
WIDTH = 120  # of tables, where there is no terminal that says


def machine() -> dict[str, Any]:
    """What the figures were measured on, so far as this process can tell without importing torch."""
    model = next((line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")), "?")
    versions = {}
    for package in ("torch", "transformers", "triton", "penstock"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = next((line.split(":", 1)[1].strip() for line in _gpu_information() if line.startswith("Model:")), None)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "python": platform.python_version(), **versions}


def show_rows(title: str, rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]], *, as_json: bool) -> None:
    """Print a table of rows; of each column its heading and how its values are written. As `show`, not where a program reads."""
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=title, box=SIMPLE_HEAD)
    for heading, how in columns.values():
        table.add_column(heading, justify="left" if how == "{}" else "right")
    for row in rows:
        table.add_row(*(how.format(row[name]) for name, (_, how) in columns.items()))
    console.print(table)


def show(title: str, figures: dict[str, Any], *, as_json: bool) -> None:
    """Print the figures; with `as_json` also as one object on the last line."""
    console = Console(stderr=as_json)
    table = Table(title=title, show_header=False)
    for name, value in figures.items():
        for key, one in value.items() if isinstance(value, dict) and name in NESTED else [(name, value)]:
            if not isinstance(one, dict | list):
                table.add_row(key, f"{one:,.4g}" if isinstance(one, float) else str(one))
    console.print(table)
    if as_json:
        print(json.dumps(figures), flush=True)  # noqa: T201  the line is the interface


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _gpu_information() -> list[str]:
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return _read(str(found[0])).splitlines() if found else []
