"""Greedy streams equal transformers' own `generate`, token for token, for every family, by its own code adopted and by the native decoder,
and in every way that a step can be put together.

Models are tiny and random, spread out so that the likeliest token wins clearly; where the reference's own two best logits are within 1e-4
of each other, either is right from there on, which is counted as a tie. The KV pool starts full of NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.base import Model
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.native import NativeModel
from penstock.engine.model.spec import NATIVE
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from ..engine.driver import Outcome, request, run  # noqa: TID252

PROMPTS, NEW_TOKENS, BLOCK_SIZE, SLOTS = 8, 64, 16, 8
LONGEST = 48
CLEAR = 1e-4  # a smaller lead of the best logit over the second is a tie
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 131, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = {"sliding_window": 11}
MOE = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 131},
    "llama": COMMON,
    "mistral": COMMON | WINDOW,
    "qwen2": COMMON,
    "qwen3": COMMON | {"head_dim": 16},
    "gemma2": COMMON | WINDOW | {"head_dim": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
    "gemma3_text": COMMON | WINDOW | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": COMMON | {"pad_token_id": 0},
    "olmo2": COMMON,
    "gemma": COMMON | {"head_dim": 16},
    "gpt_neox": COMMON,
    "mixtral": COMMON | MOE | {"num_local_experts": 4},
    "qwen3_moe": COMMON | MOE | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48},
    "olmoe": COMMON | MOE | {"num_experts": 4},
    "gpt_oss": COMMON | MOE | WINDOW | {"head_dim": 16, "num_local_experts": 4},
}


@dataclass
class Family:
    """A model, its prompts, and what transformers makes of them. `leads[i][t]` is by how much token t's logit led the second best."""

    model: Model
    prompts: list[list[int]]
    expected: list[list[int]]
    leads: list[list[float]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WAYS = [(name, way) for name in FAMILIES for way in ("adopted", "native") if way == "adopted" or name in NATIVE]


@cache
def reference(name: str) -> tuple[Model, Model | None, list[list[int]], list[list[int]], list[list[float]]]:
    """Both models, prompts, and what transformers makes of them."""
    config = AutoConfig.for_model(name, **FAMILIES[name])
    config.initializer_range = 0.3
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval().requires_grad_(False)
    for weight in module.parameters():
        if weight.dim() == 1:  # biases are drawn as 0 and norms as 1: nothing would be seen of them
            weight.add_(torch.randn_like(weight) * 0.1)
    rng = random.Random(name)
    shared = [rng.randrange(1, 131) for _ in range(2 * BLOCK_SIZE)]
    prompts = [[rng.randrange(1, 131) for _ in range(rng.randrange(1, LONGEST))] for _ in range(PROMPTS - 3)]
    prompts += [[*shared, *(rng.randrange(1, 131) for _ in range(rng.randrange(1, 9)))] for _ in range(3)]
    expected, leads = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        best = torch.stack(out.scores)[:, 0].topk(2, dim=-1).values
        expected.append(out.sequences[0, len(prompt) :].tolist())
        leads.append((best[:, 0] - best[:, 1]).tolist())
    assert len({token for ids in expected for token in ids}) > 20, "a reference that repeats itself tests little"
    decoder = read_decoder(config, torch.device("cpu"))
    native = None if decoder is None else NativeModel(decoder, dict(module.state_dict()))
    return AdoptedModel(module), native, prompts, expected, leads


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(way))
def family(request: pytest.FixtureRequest) -> Family:
    name, way = request.param
    adopted, native, *known = reference(name)
    model = adopted if way == "adopted" else native
    assert model is not None
    return Family(model, *known)


def serve(
    family: Family, *, blocks: int = 96, lookahead: int = 1, budget: int = 512, slots: int = SLOTS, waves: int = 1, attention: str = "auto"
) -> dict[int, Outcome]:
    runner = Runner(family.model, RunnerConfig(slots=slots, blocks=blocks, block_size=BLOCK_SIZE, columns=16, attention=attention))
    runner.pool.fill(float("nan"))
    requests = [request(i, prompt, NEW_TOKENS) for i, prompt in enumerate(family.prompts)]
    parts = [requests[i::waves] for i in range(waves)]
    config = SchedulerConfig(slots=slots, blocks=blocks, block_size=BLOCK_SIZE, token_budget=budget, max_model_len=256)
    return run(runner, config, parts, lookahead)


def check(family: Family, outcomes: dict[int, Outcome]) -> None:
    ties = 0
    for i, (expected, leads) in enumerate(zip(family.expected, family.leads, strict=True)):
        got = outcomes[i].ids
        assert len(got) == NEW_TOKENS
        assert outcomes[i].reason == "length"
        parted = next((t for t in range(NEW_TOKENS) if got[t] != expected[t]), None)
        if parted is not None:
            assert leads[parted] < CLEAR, f"prompt {i} parts from the reference at token {parted}, which led by {leads[parted]:.2g}"
            ties += 1
    assert ties <= 1


def test_alone(family: Family) -> None:
    check(family, serve(family, slots=1, lookahead=0))


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_batched(family: Family, lookahead: int) -> None:
    check(family, serve(family, lookahead=lookahead))


@pytest.mark.parametrize("budget", [9, 23, 57])
def test_in_chunks(family: Family, budget: int) -> None:
    check(family, serve(family, budget=budget, lookahead=budget % 3))


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_preempted_because_the_pool_is_small(family: Family, lookahead: int) -> None:
    outcomes = serve(family, blocks=20, lookahead=lookahead)
    assert sum(outcome.preemptions for outcome in outcomes.values()) > 0
    check(family, outcomes)


def test_with_prefix_hits(family: Family) -> None:
    outcomes = serve(family, waves=PROMPTS, lookahead=2)
    assert sum(outcome.cached_tokens for outcome in outcomes.values()) >= 2 * 2 * BLOCK_SIZE
    check(family, outcomes)


def test_with_a_prefix_that_another_row_of_the_same_step_computes(family: Family) -> None:
    outcomes = serve(family)
    assert sum(outcome.cached_tokens for outcome in outcomes.values()) >= 2 * 2 * BLOCK_SIZE
    check(family, outcomes)


def test_by_gathering(family: Family) -> None:
    check(family, serve(family, attention="gather", budget=40))
