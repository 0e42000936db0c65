"""The runner on a tiny random model: what it returns beyond greedy ids, and that nothing but the request itself decides its tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from penstock.engine.lora.base import AdaptedRows
from penstock.engine.memory import Workload, count_blocks
from penstock.engine.mock import MockRunner
from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.spec import ModelError
from penstock.engine.plan import StepPlan
from penstock.engine.rehearsal import run_worst_case, warm_up
from penstock.engine.request import Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import Scheduler, SchedulerConfig
from penstock.engine.spans import SpanClock

from .driver import Outcome, request, run

VOCAB = 113
NONE = np.empty(0, np.int32)


@pytest.fixture(scope="module")
def module() -> Iterator[PreTrainedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    config = AutoConfig.for_model(
        "llama", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        initializer_range=0.2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(3)
    yield AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(module: PreTrainedModel) -> dict[str, Tensor]:
    """Raw log-probabilities of a fixed sequence, from transformers, before anything of it is replaced."""
    ids = torch.arange(1, 60) * 7 % VOCAB
    with torch.inference_mode():
        return {"ids": ids, "logprobs": torch.log_softmax(module(ids[None]).logits[0].float(), -1)}


@pytest.fixture(scope="module")
def model(module: PreTrainedModel, reference: dict[str, Tensor]) -> AdoptedModel:
    return AdoptedModel(module)


def make_runner(model: AdoptedModel, slots: int = 8, blocks: int = 64) -> Runner:
    runner = Runner(model, RunnerConfig(slots=slots, blocks=blocks, columns=16))
    runner.pool.fill(float("nan"))
    return runner


def serve(
    model: AdoptedModel, requests: list[object], *, budget: int = 64, blocks: int = 64, slots: int = 8, lookahead: int = 1
) -> dict[int, Outcome]:
    config = SchedulerConfig(slots=slots, blocks=blocks, token_budget=budget, max_model_len=256)
    return run(make_runner(model, slots, blocks), config, [requests], lookahead)  # type: ignore[list-item]


PROMPTS = [[5, 6, 7], list(range(1, 40)), [9] * 17, list(range(20, 50)), [100, 3]]
RICH = Sampler(
    temperature=0.9, top_p=0.9, top_k=60, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, seed=11,
    logit_bias=((4, 1.5),), bad_words=((7, 8), (9,), (3, 4, 5)), min_tokens=5, stop_ids=(1, 2),
)  # fmt: skip


def test_a_step_is_timed_on_the_device_if_that_is_asked_for(model: AdoptedModel) -> None:
    runner = make_runner(model)
    scheduler = Scheduler(SchedulerConfig(slots=8, blocks=64, token_budget=64, max_model_len=256))
    scheduler.submit(request(1, [5, 6, 7], 3), 0.0)
    first = scheduler.plan(0.0)
    assert first is not None
    assert runner.launch(first).result().device_seconds is None
    runner.clock = SpanClock(runner.device)
    timed = [runner.launch(first).result() for _ in range(2)]
    assert all(result.device_seconds is not None and result.device_seconds > 0 for result in timed)
    assert timed[0].idle_seconds == 0
    assert timed[1].idle_seconds > 0


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, seed=4), RICH], ids=["greedy", "temperature", "rich"])
def test_tokens_do_not_depend_on_batch_chunks_preemption_or_lookahead(model: AdoptedModel, sampler: Sampler) -> None:
    alone = [serve(model, [request(i, prompt, 40, sampler)], slots=1, lookahead=0)[i].ids for i, prompt in enumerate(PROMPTS)]
    for budget, blocks, lookahead in ((64, 64, 1), (7, 64, 2), (64, 13, 0), (64, 13, 2)):
        outcomes = serve(
            model, [request(i, prompt, 40, sampler) for i, prompt in enumerate(PROMPTS)], budget=budget, blocks=blocks, lookahead=lookahead
        )
        assert [outcomes[i].ids for i in range(len(PROMPTS))] == alone
        assert blocks > 20 or sum(outcome.preemptions for outcome in outcomes.values())


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, seed=4), RICH], ids=["greedy", "temperature", "rich"])
@pytest.mark.parametrize("released", [1, 13, 39])
def test_a_stream_that_is_handed_over_continues_as_if_nothing_had_happened(model: AdoptedModel, sampler: Sampler, released: int) -> None:
    whole = serve(model, [request(0, PROMPTS[1], 40, sampler)])[0]
    if released < len(whole.ids):
        rest = serve(model, [request(0, PROMPTS[1], 40, sampler, generated=whole.ids[:released]), request(1, PROMPTS[0], 9)])[0]
        assert whole.ids[:released] + rest.ids == whole.ids


def test_different_seeds_give_different_streams(model: AdoptedModel) -> None:
    outcomes = serve(model, [request(i, PROMPTS[0], 30, Sampler(temperature=1.0, seed=i)) for i in range(8)])
    assert len({tuple(outcome.ids) for outcome in outcomes.values()}) == 8


def test_logprobs_are_those_of_the_raw_logits(model: AdoptedModel, reference: dict[str, Tensor]) -> None:
    ids, raw = reference["ids"], reference["logprobs"]
    sampler = Sampler(logprobs=3, allowed_tokens=(int(ids[-1]),))
    requests = [request(0, ids[:-1].tolist(), 1, sampler), request(1, PROMPTS[0], 5), request(2, PROMPTS[1], 3, Sampler(logprobs=0))]
    outcomes = serve(model, requests, lookahead=2, budget=200)
    ((chosen, values, rank),) = outcomes[0].logprobs
    assert outcomes[0].ids == [int(ids[-1])]
    assert chosen[0] == ids[-1]
    assert chosen[1:4] == raw[-2].topk(3).indices.tolist()
    np.testing.assert_allclose(values[:4], raw[-2][chosen[:4]], atol=1e-4)
    assert rank == 1 + int((raw[-2] > raw[-2][ids[-1]]).sum())
    assert outcomes[1].logprobs == []
    assert [entry[0][0] for entry in outcomes[2].logprobs] == outcomes[2].ids


@pytest.mark.parametrize("budget", [200, 13])
@pytest.mark.parametrize("slice_logits", [1 << 25, 5 * VOCAB])
def test_prompt_logprobs_cover_the_prompt_from_its_second_token_on(
    model: AdoptedModel, reference: dict[str, Tensor], budget: int, slice_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.engine.runner.PROMPT_LOGITS", slice_logits)
    ids, raw = reference["ids"], reference["logprobs"]
    requests = [
        request(0, ids.tolist(), 2, Sampler(prompt_logprobs=2)),
        request(1, PROMPTS[1], 4),
        request(2, PROMPTS[0], 4, Sampler(prompt_logprobs=0)),
    ]
    outcomes = serve(model, requests, budget=budget)
    top = outcomes[0].prompt_logprobs
    assert top is not None
    assert top.ids[:, 0].tolist() == ids[1:].tolist()
    np.testing.assert_allclose(top.values[:, 0], raw[:-1].gather(1, ids[1:, None])[:, 0], atol=1e-4)
    np.testing.assert_allclose(top.values[:, 1:3], raw[:-1].topk(2).values, atol=1e-4)
    assert top.ranks.tolist() == (1 + (raw[:-1] > raw[:-1].gather(1, ids[1:, None])).sum(-1)).tolist()
    assert outcomes[1].prompt_logprobs is None
    short = outcomes[2].prompt_logprobs
    assert short is not None
    assert short.ids[:, 0].tolist() == PROMPTS[0][1:]


def test_a_prompt_of_one_token_has_no_prompt_logprobs_to_tell(model: AdoptedModel) -> None:
    assert len(serve(model, [request(0, [5], 3, Sampler(prompt_logprobs=1))])[0].ids) == 3


def test_a_step_that_fails_comes_back_as_a_result_that_says_why(model: AdoptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(model)

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model, "forward", fail)
    one = np.ones(1, np.int32)
    plan = StepPlan(7, (), one * 0, one * 0, one, one * 0, one * 0, one, 0, np.ones(1, np.bool_), one)
    result = runner.launch(plan).result()
    assert result.step == 7
    assert result.error is not None
    assert "out of luck" in result.error
    assert len(result.ids) == 0


def test_warming_up_and_the_worst_case_leave_nothing_behind(model: AdoptedModel) -> None:
    expected = serve(model, [request(0, PROMPTS[1], 20)])[0].ids
    runner = make_runner(model)
    warm_up(runner)
    run_worst_case(runner, 100)
    config = SchedulerConfig(slots=8, blocks=64, token_budget=64, max_model_len=256)
    assert run(runner, config, [[request(0, PROMPTS[1], 20)]])[0].ids == expected


def test_the_worst_case_has_an_adapter_for_each_slot_and_leaves_none_behind(model: AdoptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(model, RunnerConfig(slots=8, blocks=64, block_size=16, columns=16, adapter_pages=9))
    assert runner.adapters is not None
    prepared: list[AdaptedRows] = []
    prepare = runner.adapters.backend.prepare
    monkeypatch.setattr(runner.adapters.backend, "prepare", lambda rows: prepared.append(rows) or prepare(rows))
    run_worst_case(runner, 100)
    (rows,) = prepared
    assert len(set(rows.pages)) == 8
    assert {len(pages) for pages in rows.pages} == {4}
    run_worst_case(make_runner(model), 100)
    assert len(prepared) == 1
    model.detach()


def test_blocks_fill_the_memory_that_is_given(model: AdoptedModel) -> None:
    work = Workload(slots=4, token_budget=64, max_model_len=256, block_size=16)
    assert count_blocks(model, work, 0.5) == 4 * 16  # more could never be used
    assert count_blocks(model, work, 0.5, blocks=20) == 20


@pytest.mark.parametrize(("memory", "blocks"), [(2.0, None), (0.5, 15)])
def test_a_cache_too_small_for_the_longest_sequence_is_refused_with_advice(model: AdoptedModel, memory: float, blocks: int | None) -> None:
    with pytest.raises(ModelError, match="max_model_len") as refusal:
        count_blocks(model, Workload(slots=4, token_budget=64, max_model_len=256, block_size=16), memory, blocks=blocks)
    assert refusal.value.code == "out_of_memory"


def test_the_mock_gives_the_same_stream_in_any_batch_and_after_a_hand_over() -> None:
    config = SchedulerConfig(slots=4, blocks=64, token_budget=16, max_model_len=256)
    whole = run(MockRunner(100, first=10, span=50), config, [[request(i, [1] * (3 + i), 30) for i in range(6)]], lookahead=2)
    alone = run(MockRunner(100, first=10, span=50), config, [[request(0, [1] * 5, 30, generated=whole[2].ids[:11])]])
    assert whole[2].ids[:11] + alone[0].ids == whole[2].ids
    assert set(whole[2].ids) <= set(range(10, 60))
    with pytest.raises(ValueError, match="vocabulary"):
        MockRunner(100, first=60, span=50)


def test_the_mock_goes_another_way_with_another_seed_or_token_and_alike_when_greedy() -> None:
    config = SchedulerConfig(slots=4, blocks=64, token_budget=16, max_model_len=256)

    def ids(prompt: list[int], temperature: float, seed: int) -> list[int]:
        sampler = Sampler(temperature=temperature, seed=seed)
        return run(MockRunner(100), config, [[request(0, prompt, 30, sampler)]])[0].ids

    assert ids([1, 2], 1.0, 7) == ids([1, 2], 1.0, 7)
    assert ids([1, 2], 0.0, 7) == ids([1, 2], 0.0, 8)
    assert len({tuple(one) for one in (ids([1, 2], 1.0, 7), ids([1, 2], 1.0, 8), ids([1, 3], 1.0, 7), ids([1, 2], 0.0, 7))}) == 4
