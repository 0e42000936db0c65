"""The native decoder with its Triton kernels against its plain form, over whole runs. On CUDA decode steps are graphs.

Where there is no GPU the kernels run under Triton's interpreter, in a process of its own: see `tests/engine/test_kernels.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from penstock.engine.attention.base import KVPool, StepRows
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.native import NativeModel
from penstock.engine.request import Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from ..engine.driver import request, run  # noqa: TID252
from .test_native import make

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
READY = GPU or os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ["qwen3", "gemma2", "gemma3_text", "olmo2", "partial", "biases"]


@pytest.mark.skipif(READY, reason="the kernels run in this process")
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not READY, reason="runs in a process of its own, under the interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_the_kernels_gives_the_tokens_of_a_plain_one(name: str) -> None:
    module = make(name).to(DEVICE)
    decoder = read_decoder(module.config, DEVICE)
    assert decoder is not None
    model = NativeModel(decoder, dict(module.state_dict()))
    # Greedy, drawn, with wishes that the sampling in a graph does not know, and one that ends before the others.
    top, penalized = Sampler(temperature=0.7, seed=2, top_k=5), Sampler(presence_penalty=0.5)
    samplers = [Sampler(), Sampler(temperature=0.9, seed=1), top, penalized, Sampler()]
    requests = [
        request(i, [1 + (3 * i + j) % 120 for j in range(n)], limit, samplers[i])
        for i, (n, limit) in enumerate(((3, 6), (30, 6), (17, 6), (1, 6), (8, 3)))
    ]
    got = []
    for attention in ("gather", "triton"):
        runner = Runner(model, RunnerConfig(slots=4, blocks=12, columns=4, attention=attention))
        runner.pool.fill(float("nan"))
        outcomes = run(runner, SchedulerConfig(slots=4, blocks=12, token_budget=23, max_model_len=64), [requests])
        got.append([(outcome.ids, outcome.reason) for outcome in outcomes.values()])
    assert got[0] == got[1]


@pytest.mark.skipif(not READY, reason="runs in a process of its own, under the interpreter")
@pytest.mark.parametrize("name", ["llama", "qwen3", "biases"])
@pytest.mark.parametrize("more", [0, 1])
def test_in_half_precision_it_errs_no_more_than_transformers(name: str, more: int) -> None:
    from penstock.engine.attention.triton import TritonAttention
    from penstock.engine.kernels.few_rows import FEW

    tokens = FEW + more  # on either side of where products change
    module = make(name, torch.float16).to(DEVICE)
    decoder = read_decoder(module.config, DEVICE)
    assert decoder is not None
    model = NativeModel(decoder, dict(module.state_dict()))
    pool = KVPool(model.layers, 2, 16, model.dtype, DEVICE)
    backend = TritonAttention(pool, model.layers, slots=1, columns=2)
    model.attach(pool, backend)
    zero, both = np.zeros(1, np.int32), np.arange(2, dtype=np.int32)
    rows = StepRows(zero, zero, np.array([tokens], np.int32), 0, np.array([[1, 0]], np.int32), (0 * both, both))
    positions = rows.positions()
    columns = backend.prepare(rows, positions, rows.places(positions, 16))
    ids = torch.randint(1, 131, (tokens,), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with torch.inference_mode():
        backend.begin({key: torch.from_numpy(np.ascontiguousarray(value.astype(np.int64))).to(DEVICE) for key, value in columns.items()})
        ours = model.forward(ids, torch.from_numpy(positions).long().to(DEVICE), None)
    theirs = module(ids[None]).logits[0]
    exact = module.double()(ids[None]).logits[0]
    errors = [float((got.double() - exact).square().mean().sqrt()) for got in (ours, theirs)]
    assert errors[0] < 1.1 * errors[1], errors
