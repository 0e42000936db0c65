"""Keys and values in eight bits: what is stored, that attention is exact over it, how much of it fits, and where it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.engine.attention.base import KVPool, LayerShape, block_bytes
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.attention.inplace import suits
from penstock.engine.attention.storage import FP8, choose_dtype, raw, rounded
from penstock.engine.memory import Workload, count_blocks
from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.spec import ModelError
from penstock.engine.request import Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from .attending import make_step
from .driver import request, run
from .test_attention import CPU, KINDS, TOLERANCE
from .test_runner import PROMPTS, VOCAB

MIXED = [0, 3, 15, 16, 31, 32, 100, 400], [(0, 1), (0, 16), (0, 50), (16, 7), (33, 40)]


@pytest.fixture(scope="module")
def model() -> AdoptedModel:
    config = AutoConfig.for_model(
        "llama", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        initializer_range=0.2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(3)
    return AdoptedModel(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_stored_saturates_and_only_nan_is_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, 447.0, 449.0, 3e4, float("inf"), -3e4, float("-inf"), 2.0**-9, 2.0**-11, float("nan")], dtype=dtype)
    kept = rounded(x, FP8).float()
    assert kept[:-1].tolist() == [0.0, 1.0, 448.0, 448.0, 448.0, 448.0, -448.0, -448.0, 2.0**-9, 0.0]
    assert kept[-1].isnan()
    assert rounded(x, dtype) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_step_is_exact_over_what_is_stored(kind: str, dtype: torch.dtype) -> None:
    """Whole prompts too, although their keys need not be read back."""
    step = make_step(KINDS[kind], *MIXED, dtype=dtype, kv_dtype=FP8)
    out = step.run(GatherAttention(step.pool, [step.shape]))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), step.expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    exact = make_step(KINDS[kind], *MIXED, dtype=dtype)
    assert not torch.allclose(step.expected, exact.expected, atol=1e-3)


def test_huge_keys_and_values_are_attended_to_without_nan() -> None:
    step = make_step(KINDS["full"], [5, 40], [(0, 20), (20, 9)], kv_dtype=FP8)
    step.k *= 1e30
    step.v *= 1e30
    out = step.run(GatherAttention(step.pool, [step.shape]))
    assert out.isfinite().all()
    torch.testing.assert_close(out[2].abs(), torch.full_like(out[2], 448.0))  # a prompt's first token sees itself alone


def test_twice_as_many_blocks_fit(model: AdoptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerShape(4, 2, 16, 16, 1.0), LayerShape(4, 4, 8, 24, 1.0)]
    assert block_bytes(layers, 16, torch.bfloat16) == 2 * block_bytes(layers, 16, FP8)
    assert sum(stack.nbytes for stack in KVPool(layers, 5, 16, FP8, CPU).stacks) == 5 * block_bytes(layers, 16, FP8)
    each = block_bytes(model.layers, 16, torch.float32)
    monkeypatch.setattr("penstock.engine.memory._cpu_bytes", lambda _: 20 * each)
    work = Workload(slots=100, token_budget=64, max_model_len=256, block_size=16)
    assert count_blocks(model, work, 0.5) == 20
    assert count_blocks(model, replace(work, kv_dtype=FP8), 0.5) == 80
    assert work.config(20).kv_dtype is None
    assert replace(work, kv_dtype=FP8).config(80).kv_dtype == FP8


def test_a_block_begins_empty(model: AdoptedModel) -> None:
    pool = KVPool(model.layers, 4, 16, FP8, CPU)
    pool.fill(float("nan"))
    pool.clear(torch.tensor([1, 3]))
    assert pool.stacks[0][:, [1, 3]].float().eq(0).all()
    assert pool.stacks[0][:, [0, 2]].isnan().all()
    assert raw(pool.stacks[0]).data_ptr() == pool.stacks[0].data_ptr()


def tell(model: AdoptedModel, kv_dtype: torch.dtype | None, budget: int, blocks: int, lookahead: int) -> Tensor:
    """The log-probabilities of all prompts' tokens, in a run that goes on after them."""
    runner = Runner(model, RunnerConfig(slots=8, blocks=blocks, columns=16, kv_dtype=kv_dtype))
    runner.pool.fill(float("nan"))
    config = SchedulerConfig(slots=8, blocks=blocks, token_budget=budget, max_model_len=256)
    requests = [request(i, prompt, 20, Sampler(prompt_logprobs=0)) for i, prompt in enumerate(PROMPTS)]
    outcomes = run(runner, config, [requests], lookahead)
    assert all(len(outcome.ids) == 20 for outcome in outcomes.values())
    rows = [outcomes[i].prompt_logprobs for i in range(len(PROMPTS))]
    return torch.cat([torch.as_tensor(row.values[:, 0]) for row in rows if row is not None])


def test_a_run_is_near_that_of_the_models_own_dtype_and_the_same_however_it_is_cut(model: AdoptedModel) -> None:
    whole = tell(model, FP8, 200, 64, 1)
    assert 1e-3 < (tell(model, None, 200, 64, 1) - whole).abs().mean() < 0.2
    for cut in ((7, 64, 2), (64, 13, 2)):
        # Sums that are taken in another order may be rounded to another eighth, so here and there a little is different.
        assert (tell(model, FP8, *cut) - whole).abs().median() < 1e-4


def test_auto_reads_eight_bits_by_gathering_because_the_kernel_cannot(model: AdoptedModel) -> None:
    runner = Runner(model, RunnerConfig(slots=2, blocks=4, kv_dtype=FP8))
    assert type(runner.attention) is GatherAttention
    assert not suits(model.layers, 16, FP8, CPU)


@contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(ModelError, match=match) as refusal:
        yield
    assert refusal.value.code == "invalid_option"


def test_what_cannot_be_done_is_refused_by_name(model: AdoptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("auto", torch.bfloat16, CPU, deterministic=True) == torch.bfloat16
    assert choose_dtype("fp8", torch.float32, CPU) == FP8
    with refused("auto or fp8"):
        choose_dtype("int4", torch.bfloat16, CPU)
    with refused("deterministic"):
        choose_dtype("fp8", torch.float32, CPU, deterministic=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with refused(r"8\.0 of cuda:0 is below 8\.9"):
        choose_dtype("fp8", torch.bfloat16, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_dtype("fp8", torch.bfloat16, torch.device("cuda:0"), deterministic=True) == FP8
    with refused("inplace"):
        Runner(model, RunnerConfig(slots=2, blocks=4, attention="inplace", kv_dtype=FP8))
    with pytest.raises(Refusal, match="kv_dtype"):
        EngineConfig(kv_dtype="int4")
