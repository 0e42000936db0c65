"""Deterministic models: a stream's logits are the same bits, whatever is in the batch with it and however it came to where it is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.base import Model
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.glue import PlainGlue
from penstock.engine.model.native import NativeModel
from penstock.engine.model.spec import ModelError
from penstock.engine.plan import StepPlan
from penstock.engine.request import Request, Sampler
from penstock.engine.results import Launched
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from ..engine.driver import Outcome, request, run  # noqa: TID252
from ..engine.interpreted import DEVICE, GPU, INTERPRETED, apart, assert_passes, elsewhere, here  # noqa: TID252
from .test_fused import sized
from .test_native import make

NEW_TOKENS, SLOTS = (6, 4) if INTERPRETED else (12, 6)  # the interpreter is slow
NATIVE = ["llama", "qwen3", "gemma2", "olmo2", "biases"]
Rows = dict[tuple[int, int], list[Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@apart
def test_all_of_this_file_that_needs_triton_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


class Recording(Runner):
    """Keeps the logits of each sampled token, by the seed of its stream and the token's position. Streams ask for log-probabilities, so
    that all logits pass here, those of graphs too."""

    def __init__(self, model: Model, config: RunnerConfig) -> None:
        super().__init__(model, config)
        self.streams: dict[int, int] = {}
        self.now: list[tuple[int, int]] = []
        self.seen: Rows = {}

    def launch(self, plan: StepPlan) -> Launched:
        self.streams |= {fill.slot: fill.sampler.seed for fill in plan.fills}
        chosen = plan.samples
        slots, ends = plan.slots[chosen].tolist(), (plan.starts + plan.counts)[chosen].tolist()
        self.now = [(self.streams[slot], end) for slot, end in zip(slots, ends, strict=True)]
        return super().launch(plan)

    def _sample(self, logits: Tensor, sent: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], object]:
        for key, row in zip(self.now, logits.to("cpu", copy=True), strict=True):
            self.seen.setdefault(key, []).append(row)
        return super()._sample(logits, sent)


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    shared = [draw.randrange(1, 131) for _ in range(32)]
    alone = [[draw.randrange(1, 131) for _ in range(count)] for count in ((1, 15, 45) if INTERPRETED else (1, 3, 16, 29, 45))]
    return alone + [[*shared, *(draw.randrange(1, 131) for _ in range(count))] for count in ((1, 7) if INTERPRETED else (1, 7, 11))]


def requests(prompt_logprobs: int = -1) -> list[Request]:
    """Some greedy, some drawn, and some whose prompts' log-probabilities are asked for."""
    samplers = [
        Sampler(temperature=0.8 * (i % 2), seed=i, logprobs=0, prompt_logprobs=prompt_logprobs if i % 3 == 0 else -1)
        for i in range(len(prompts()))
    ]
    return [request(i, prompt, NEW_TOKENS, samplers[i]) for i, prompt in enumerate(prompts())]


def serve(
    model: Model, waves: list[list[Request]], *, blocks: int = 64, budget: int = 512, slots: int = SLOTS, attention: str = "auto",
    graphs: bool = False,
) -> tuple[Rows, dict[int, Outcome]]:  # fmt: skip
    runner = Recording(model, RunnerConfig(slots=slots, blocks=blocks, columns=8, attention=attention, graphs=64 if graphs else 0))
    runner.pool.fill(float("nan"))
    if graphs and not GPU:
        runner.graphs = sized(runner)
    outcomes = run(runner, SchedulerConfig(slots=slots, blocks=blocks, token_budget=budget, max_model_len=64), waves)
    return runner.seen, outcomes


def assert_same(alone: Rows, seen: Rows) -> None:
    assert seen.keys() == alone.keys()
    for key, rows in seen.items():
        for row in rows:
            assert torch.equal(row, alone[key][0]), f"stream {key[0]} at {key[1]}: {(row - alone[key][0]).abs().max()}"


def assert_invariant(model: Model, attention: str = "auto", *, graphs: bool = False, budgets: tuple[int, ...] = (7, 23, 64)) -> None:
    """Against each stream alone, its prompt in one chunk."""
    alone: Rows = {}
    for one in requests():
        alone |= serve(model, [[one]], attention=attention)[0]
    assert len({tuple(row[0].tolist()) for row in alone.values()}) == len(alone) == len(prompts()) * NEW_TOKENS
    for budget in budgets:
        assert_same(alone, serve(model, [requests()], budget=budget, attention=attention, graphs=graphs)[0])
    seen, outcomes = serve(model, [requests()], blocks=5, budget=40, attention=attention, graphs=graphs)
    assert sum(outcome.preemptions for outcome in outcomes.values())
    assert_same(alone, seen)
    seen, outcomes = serve(model, [[one] for one in reversed(requests())], attention=attention, graphs=graphs)
    assert sum(outcome.cached_tokens for outcome in outcomes.values())
    assert_same(alone, seen)


def native(name: str) -> NativeModel:
    module = make(name).to(DEVICE)
    decoder = read_decoder(module.config, DEVICE)
    assert decoder is not None
    return NativeModel(decoder, dict(module.state_dict()), deterministic=True)


@elsewhere
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_model_on_a_cpu(name: str) -> None:
    assert_invariant(native(name))


@elsewhere
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_an_adopted_model_on_a_cpu(name: str) -> None:
    assert_invariant(AdoptedModel(make(name), deterministic=True))


@elsewhere
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_family_whose_own_code_multiplies_rows_together_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="bits depend") as refusal:
        AdoptedModel(make(name), deterministic=True)
    assert refusal.value.code == "unsupported_model"


@elsewhere
def test_what_is_cut_among_threads_changes_nothing() -> None:
    model = native("gemma2")
    alone, _ = serve(model, [requests()])
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same(alone, serve(model, [requests()], budget=57)[0])


@elsewhere
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_an_activation_of_many_numbers_is_cut_among_threads_and_rounds_as_that_of_few(activation: str) -> None:
    glue = PlainGlue((), activation, torch.float32, deterministic=True)
    x = torch.randn(200, 2 * 1003)  # more than torch leaves to one thread, in rows that no vector divides
    alone = torch.cat([glue.gate(row[None]) for row in x])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(glue.gate(x), alone)
        assert torch.equal(glue.gate(x[57:]), alone[57:])


@elsewhere
def test_an_adopted_model_on_a_cpu_wants_one_thread() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ModelError, match="threads=1") as refusal:
        AdoptedModel(make("gpt2"), deterministic=True)
    assert refusal.value.code == "invalid_option"


@elsewhere
def test_layers_made_of_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="experts") as refusal:
        native("mixtral")
    assert refusal.value.code == "unsupported_model"


@elsewhere
def test_a_neighbour_that_asks_for_its_prompts_log_probabilities_changes_nothing() -> None:
    model = native("gemma2")
    plain, _ = serve(model, [requests()])
    assert_same(plain, serve(model, [requests(prompt_logprobs=1)])[0])


@elsewhere
def test_a_cpu_can_promise_it_in_float32_only() -> None:
    module = make("llama", torch.bfloat16)
    decoder = read_decoder(module.config, DEVICE)
    assert decoder is not None
    with pytest.raises(ModelError, match="float32") as refusal:
        NativeModel(decoder, dict(module.state_dict()), deterministic=True)
    assert refusal.value.code == "invalid_option"
    with pytest.raises(ModelError, match="multiple of 16") as refusal:
        Runner(native("llama"), RunnerConfig(slots=2, blocks=4, attention="gather"))
    assert refusal.value.code == "unsupported_model"


@here
@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("graphs", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("name", ["qwen3", *(() if INTERPRETED else ("llama", "olmo2", "biases")), "gemma2"])
def test_a_native_model_with_the_kernels(name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.engine.model.invariant import Tiled

    monkeypatch.setattr("penstock.engine.model.linear.invariant_method", Tiled)
    assert_invariant(native(name), "triton", graphs=graphs, budgets=(23,))
