"""Time all kernels of a model, in a process of its own.

    python -m penstock.engine.bench '{"model": FOLDER, "rows": [1, 256], "keys": 576}'      (prints one JSON object)
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from penstock.engine.bench.adapters import time_adapters
from penstock.engine.bench.attention import time_decodes, time_prompts
from penstock.engine.bench.between import time_between, time_sampling
from penstock.engine.bench.case import Case, Subject, read_subject
from penstock.engine.bench.ceilings import Ceilings, measure_ceilings
from penstock.engine.bench.clock import time_calls
from penstock.engine.bench.experts import time_experts
from penstock.engine.bench.products import time_few, time_head, time_many, time_products
from penstock.engine.model.load import DTYPES, read_config
from penstock.engine.model.spec import read_spec

PROMPTS = ((1, 512), (4, 512), (16, 512), (1, 8192))  # and tokens in each
SAMPLED = 512  # rows: a step may have more tokens, but not more streams


def measure(model: str, rows: list[int], keys: int, dtype: str = "auto", device: str = "auto", kv_dtype: str = "auto") -> dict[str, Any]:
    """The figures of `penstock bench kernels`: `ceilings`, and `rows`, one for each kernel and size. `model` is a folder with a
    config.json. Raises `ModelError`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.empty(0, device=device).device  # which one of several, too
    spec = read_spec(model, dtype="float32" if (dtype, device) == ("auto", "cpu") else dtype, weights="random")
    subject = read_subject(
        read_config(spec), max(keys, spec.max_model_len), DTYPES[spec.dtype], where, fused=device == "cuda", kv_dtype=kv_dtype
    )
    torch.manual_seed(0)
    ceilings = measure_ceilings(where, subject.dtype)
    return {
        "ceilings": {
            "device": torch.cuda.get_device_name(where) if device == "cuda" else platform.machine(), "dtype": spec.dtype,
            "tb_per_s": ceilings.bandwidth / 1e12, "read_tb_per_s": ceilings.read / 1e12, "copy_tb_per_s": ceilings.copy / 1e12,
            "tflop_per_s": ceilings.multiply / 1e12, "empty_us": ceilings.empty * 1e6,
        },
        "rows": [timed(case, time_calls(case.calls, where), ceilings) for case in cases(subject, rows, keys)],
    }  # fmt: skip


def cases(subject: Subject, rows: Iterable[int], keys: int) -> Iterator[Case]:
    """Made one after another, so that each may have the memory of the one before."""
    for count in rows:
        yield from chain(time_between(subject, count), time_products(subject, count), time_few(subject, count))
        yield from time_many(subject, count)
        yield from chain(time_experts(subject, count), time_adapters(subject, count, min(count, SAMPLED)))
        if count <= SAMPLED:
            yield from chain(time_decodes(subject, count, keys), time_head(subject, count), time_sampling(subject, count))
    for prompts, tokens in PROMPTS:
        if tokens <= subject.longest and (subject.device.type == "cuda" or prompts == 1):
            yield from time_prompts(subject, prompts, tokens)


def timed(case: Case, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    floor = ceilings.floor(case.bytes, case.flops)
    return {
        "kernel": case.kernel, "shape": case.shape, "rows": case.rows, "us": seconds * 1e6, "floor_us": floor * 1e6,
        "of_floor": floor / seconds, "tb_per_s": case.bytes / seconds / 1e12, "tflop_per_s": case.flops / seconds / 1e12,
        "bytes": case.bytes, "flops": case.flops,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)  # noqa: T201  the line is the interface
