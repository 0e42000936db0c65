"""The Triton kernels over keys and values in eight bits, against float64 over what the pool holds.

Triton's interpreter knows e4m3, but rounds to it in ways of its own (a carry into the exponent is lost, NaN is a number), so there new keys
and values are such as need no rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine.attention.base import KVPool, LayerAttention, LayerShape
from penstock.engine.attention.storage import FP8, raw, rounded
from penstock.engine.request import Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from .attending import Step, make_step
from .driver import request, run
from .interpreted import DEVICE, GPU, INTERPRETED, apart, assert_passes, here
from .test_kernels import DTYPES, SHAPES, TOLERANCE

rounds = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not round as a GPU does")


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


def step_of(shape: LayerShape, decodes: list[int], chunks: list[tuple[int, int]], dtype: torch.dtype, size: int = 16) -> Step:
    step = make_step(
        shape, decodes, chunks, dtype=dtype, kv_dtype=FP8, device=str(DEVICE), begun_as_zero=False, block_size=size, seed=len(decodes)
    )
    if INTERPRETED:
        step.k, step.v = (rounded(x, FP8).to(dtype) for x in (step.k, step.v))
    return step


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "deterministic"), [*((name, False) for name in SHAPES), ("64", True), ("all", True)])
def test_paged_attention_of_a_mixed_step_is_exact(name: str, deterministic: bool, dtype: torch.dtype) -> None:
    from penstock.engine.attention.triton import TritonAttention

    step = step_of(SHAPES[name], [0, 17, 530, 95], [(0, 1), (0, 20), (30, 37)], dtype, 32 if name == "64" else 16)
    backend = TritonAttention(step.pool, [step.shape], *step.rows.table.shape, dtype=dtype, deterministic=deterministic)
    out = step.run(backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), step.expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_alone_split_their_keys_and_merge_them_exactly(dtype: torch.dtype) -> None:
    from penstock.engine.attention.triton import TritonAttention

    for positions in ([900], [1, 700, 1300]):
        step = step_of(SHAPES["sinks"], positions, [], dtype)
        backend = TritonAttention(step.pool, [step.shape], *step.rows.table.shape, dtype=dtype)
        backend.processors = 32
        torch.testing.assert_close(step.run(backend).double(), step.expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "pairs", "norm", "window"), [(64, 32, True, None), (64, 32, False, 40), (20, 10, False, 1)])
@pytest.mark.parametrize("splitting", [False, True])
def test_a_decode_attends_to_exactly_what_later_tokens_will_read(
    dim: int, pairs: int, norm: bool, window: int | None, splitting: bool, dtype: torch.dtype
) -> None:
    """The newest key and value, which one launch makes and attends to, against another that finds them in the pool."""
    from penstock.engine.attention.triton import TritonAttention
    from penstock.engine.kernels.heads import turn_heads

    heads, kv_heads = 4, 2
    shape = LayerShape(heads, kv_heads, dim, dim, 0.2, window=window)
    step = step_of(shape, [0, 15, 16, 200, 131], [], dtype)
    qkv = torch.randn(5, (heads + 2 * kv_heads) * dim).to(dtype).to(DEVICE)
    weights = torch.randn(heads + kv_heads, dim, device=DEVICE) if norm else None
    angles = torch.arange(300).double()[:, None] * 0.7 ** torch.arange(pairs)
    cos, sin = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    rows, positions = step.rows, step.rows.positions()
    columns = {"sources": rows.slots, "positions": positions, "places": rows.places(positions, 16), "decodes": np.array([5])}
    sent = {name: torch.from_numpy(column.astype(np.int64)).to(DEVICE) for name, column in columns.items()}
    backend = TritonAttention(step.pool, [shape], *rows.table.shape, dtype=dtype)
    backend.table[: len(rows.table)] = torch.from_numpy(rows.table).to(DEVICE)
    backend.processors = 32 if splitting else 1
    backend.begin_sized(sent, 5, 300)
    before = [raw(part).clone() for part in step.pool.layers[0]]
    layer = LayerAttention(shape, *step.pool.layers[0], backend)
    together = backend.attend_fused(layer, qkv, weights, 1e-6, cos, sin, sent["positions"])
    assert not together.isnan().any()
    apart = [part.clone().view(FP8) for part in before]
    q = turn_heads(qkv, weights, 1e-6, cos, sin, sent["positions"], sent["places"], apart[0], apart[1])
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(backend.attend_written(layer, q).double(), together.double(), **near)
    for one, other, old in zip(step.pool.layers[0], apart, before, strict=True):
        # Two compilations may sum a norm in two orders: then a key can be rounded to the next eighth.
        torch.testing.assert_close(one.float(), other.float(), atol=2**-9, rtol=0.13, equal_nan=True)
        assert int((raw(one) != old).any(-1).sum()) == 5 * kv_heads


def write(x: Tensor) -> Tensor:
    """x `[tokens, 1, dim]` as the kernel stores it."""
    from penstock.engine.kernels.paged_attention import write_rows

    pool = KVPool([LayerShape(1, 1, x.shape[2], x.shape[2], 1.0)], -(-len(x) // 16), 16, FP8, DEVICE).layers[0][0]
    write_rows(x.to(DEVICE), pool, torch.arange(len(x), device=DEVICE))
    return pool.view(-1, 1, x.shape[2])[: len(x)].cpu()


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_too_large_becomes_the_largest(dtype: torch.dtype) -> None:
    x = torch.tensor([448.0, 449.0, 3e4, float("inf"), -448.0, -500.0, -3e4, float("-inf")] * 2, dtype=dtype).view(1, 1, 16)
    assert write(x).float().view(-1).tolist() == ([448.0] * 4 + [-448.0] * 4) * 2


@here
@rounds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x = (torch.randn(500, 1, 64) * torch.logspace(-4, 4, 64)).to(dtype)
    x[3, 0, 5] = float("nan")
    got, expected = (kept.cpu().float() for kept in (write(x), rounded(x, FP8)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)  # a NaN may have either sign
    assert int(got.isnan().sum()) == 1


@here
@rounds
def test_a_run_with_the_kernels_is_near_a_plain_one() -> None:
    """On CUDA its decodes are graphs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from penstock.engine.model.decoder import read_decoder
    from penstock.engine.model.native import NativeModel

    config = AutoConfig.for_model(
        "qwen3", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=131, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(DEVICE)
    decoder = read_decoder(module.config, DEVICE)
    assert decoder is not None
    model = NativeModel(decoder, dict(module.state_dict()))
    told = []
    for attention in ("gather", "triton"):
        runner = Runner(model, RunnerConfig(slots=4, blocks=40, columns=10, attention=attention, kv_dtype=FP8))
        requests = [request(i, [(7 * i + j) % 130 for j in range(20 + 30 * i)], 20, Sampler(prompt_logprobs=0)) for i in range(3)]
        requests += [request(3, list(range(40)), 20)]
        outcomes = run(runner, SchedulerConfig(slots=4, blocks=40, token_budget=64, max_model_len=160), [requests])
        assert all(len(outcome.ids) == 20 for outcome in outcomes.values())
        rows = [outcomes[i].prompt_logprobs for i in range(3)]
        told.append(torch.cat([torch.as_tensor(row.values[:, 0]) for row in rows if row is not None]))
    assert (told[0] - told[1]).abs().mean() < 0.05
    assert not GPU or runner.graphs is not None
