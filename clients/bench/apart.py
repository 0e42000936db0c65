"""Measurements that need torch: each is a module, run in a process of its own, that prints one JSON object on its last line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from penstock.clients.errors import PenstockError


def run_apart(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m penstock.MODULE ARGUMENTS…` prints. Raises `PenstockError` with the end of what it said, if it fails."""
    done = subprocess.run([sys.executable, "-P", "-m", f"penstock.{module}", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PenstockError(f"{module} failed: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def against_transformers(shape: str, workload: str, rate: float) -> dict[str, Any]:
    """The workload through transformers alone, and how many times as fast `rate`, tokens a second, is."""
    figures = run_apart("clients.bench.against", shape, workload)
    best = max(value for name, value in figures.items() if name.startswith("static"))
    figures |= {"static_best": best, "ratio_static": rate / best}
    if "generate_batch" in figures:
        figures["ratio_generate_batch"] = rate / figures["generate_batch"]
    return figures
