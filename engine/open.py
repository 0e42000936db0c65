"""From settings to a runner that is ready for plans, and the facts that others need to know of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.mock import PACED, MockRunner
from penstock.engine.plan import MOST_AHEAD

if TYPE_CHECKING:
    from penstock.engine.runner import Runner

TINY = Path(__file__).with_name("tiny")
OPENING = ("imports", "weights", "memory", "warm_up")  # what opening a model takes time for, one after another
PAGES = 64  # of adapters on the device, where nobody says how many


def model_folder(model: str) -> str:
    """Where a model is: `tiny` is in the package; anything else is a folder or a hub id already."""
    return str(TINY) if model == "tiny" else model


def open_mock(
    *, model: str, max_running: int, block_size: int, blocks: int | None, token_budget: int | None, mock_step: float, **_: Any
) -> tuple[MockRunner, dict[str, Any]]:
    """A mock executor with the vocabulary of `model`, if that has a config.json, and a roomy cache unless `blocks` says otherwise. Greedy
    unless a request says otherwise: then it gives the same each time."""
    path = Path(model_folder(model)) / "config.json"
    vocab_size = int(json.loads(path.read_text())["vocab_size"]) if path.is_file() else 32_000
    max_model_len = 32_768
    return MockRunner(vocab_size, first=vocab_size // 4, span=vocab_size // 2, pace=mock_step), {
        "digest": "mock", "name": "mock", "vocab_size": vocab_size, "max_model_len": max_model_len, "eos": [],
        "defaults": {"temperature": 0.0},
        "slots": max_running, "blocks": blocks or max_running * 4096 // block_size, "block_size": block_size,
        "token_budget": token_budget or 8192, "dtype": "none", "device": "none", "kv_dtype": "none", "decoder": "none",
        "attention": "none", "graphs": False, "deterministic": True, "step_s": mock_step * (1 + (token_budget or 8192) / PACED),
        "adapters": None,
    }  # fmt: skip


def open_model(
    *,
    model: str,
    weights: str,
    dtype: str,
    kv_dtype: str,
    device: str,
    max_model_len: int | None,
    memory: float | None,
    block_size: int,
    blocks: int | None,
    max_running: int,
    token_budget: int | None,
    lookahead: int | None,
    threads: int | None,
    seed: int,
    decoder: str,
    graphs: bool,
    deterministic: bool,
    time_steps: bool,
    adapter_pages: int | None,
    adapter_host: int,
    values: Mapping[str, Any] | None = None,
) -> tuple[Runner, dict[str, Any]]:
    """Load a model, size its cache, warm it up. `values` as for `build_model`. Raises `ModelError`.

    Where nothing is said: a GPU if there is one; the model's own dtype there, float32 on a CPU; 90 % of a GPU's memory, 30 % of a CPU's.
    """
    marks = [time.perf_counter()]
    import torch

    from penstock.engine.attention.storage import choose_dtype
    from penstock.engine.memory import Workload, count_blocks, count_pages
    from penstock.engine.model.build import build_model
    from penstock.engine.model.spec import ModelError, read_spec
    from penstock.engine.rehearsal import warm_up
    from penstock.engine.runner import Runner
    from penstock.engine.spans import SpanClock

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ModelError("invalid_option", "device=cuda: torch sees no CUDA device")
    on_cpu = device == "cpu"
    if on_cpu:
        torch.set_num_threads(threads or os.cpu_count() or 1)
    else:  # of some rows by a long inner dimension a product of cuBLAS takes up to a sixth longer, and others as long
        torch.backends.cuda.preferred_blas_library("cublaslt")
    dtype = "float32" if dtype == "auto" and on_cpu else dtype
    spec = read_spec(model_folder(model), dtype=dtype, max_model_len=max_model_len, weights=weights, seed=seed)
    stored = choose_dtype(kv_dtype, getattr(torch, spec.dtype), torch.device(device), deterministic=deterministic)
    marks.append(time.perf_counter())
    built = build_model(spec, torch.device(device), decoder, deterministic=deterministic, values=values)
    marks.append(time.perf_counter())
    work = Workload(
        slots=max_running, token_budget=token_budget or (512 if on_cpu else 8192), max_model_len=spec.max_model_len, block_size=block_size,
        kv_dtype=stored, adapter_pages=count_pages(built, PAGES) if adapter_pages is None else adapter_pages,
        adapter_host=adapter_host,
    )  # fmt: skip
    count = count_blocks(built, work, memory or (0.3 if on_cpu else 0.9), blocks=blocks, graphs=graphs)
    marks.append(time.perf_counter())
    runner = Runner(built, work.config(count, in_flight=(MOST_AHEAD if lookahead is None else lookahead) + 1, graphs=graphs))
    step_s = warm_up(runner) * work.token_budget
    marks.append(time.perf_counter())
    runner.clock = SpanClock(runner.device) if time_steps else None
    defaults = spec.defaults
    return runner, {
        "digest": spec.digest, "name": model, "vocab_size": spec.vocab_size, "max_model_len": spec.max_model_len, "eos": spec.eos_ids,
        "defaults": {
            "temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p, "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
        },
        "slots": max_running, "blocks": count, "block_size": block_size, "token_budget": work.token_budget, "dtype": spec.dtype,
        "kv_dtype": str(stored).removeprefix("torch."), "device": device, "decoder": type(built).__name__,
        "attention": type(runner.attention).__name__, "graphs": runner.graphs is not None, "deterministic": built.deterministic,
        "step_s": step_s, "adapters": None if runner.adapters is None else runner.adapters.facts(),
        "opening_s": {name: round(after - before, 3) for name, (before, after) in zip(OPENING, pairwise(marks), strict=True)},
    }  # fmt: skip
