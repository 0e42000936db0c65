"""The native decoder with its Triton kernels against its plain form, over whole runs. On CUDA decode steps are graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from penstock.engine.attention.base import KVPool, StepRows
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.native import NativeModel
from penstock.engine.rehearsal import warm_up
from penstock.engine.request import Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from ..engine.driver import request, run  # noqa: TID252
from ..engine.interpreted import DEVICE, GPU, apart, assert_passes, here  # noqa: TID252
from .test_native import make

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from penstock.engine.graphs import StepGraphs
    from penstock.engine.lora.triton import TritonAdapters

NAMES = ["qwen3", "gemma2", "gemma3_text", "olmo2", "partial", "biases"]


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


def build(module: PreTrainedModel) -> NativeModel:
    decoder = read_decoder(module.config, DEVICE)
    assert decoder is not None
    return NativeModel(decoder, dict(module.state_dict()))


def sized(runner: Runner, adapters: TritonAdapters | None = None, most: int = 32) -> StepGraphs:
    """Steps that are filled up to the sizes of graphs, and simply run again where there is no CUDA that could record them."""
    from penstock.engine.graphs import StepGraphs

    def record(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        out = step()
        return lambda: out.copy_(step()), out

    return StepGraphs(runner.model, runner.attention, runner.last, most=most, in_flight=3, record=record, adapters=adapters)


@here
@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_the_kernels_gives_the_tokens_of_a_plain_one(name: str) -> None:
    compare_runs(name)


def compare_runs(name: str) -> None:
    model = build(make(name).to(DEVICE))
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
        if attention == "triton" and not GPU:
            runner.graphs = sized(runner)
        outcomes = run(runner, SchedulerConfig(slots=4, blocks=12, token_budget=23, max_model_len=64), [requests])
        got.append([(outcome.ids, outcome.reason) for outcome in outcomes.values()])
    assert got[0] == got[1]
    assert runner.graphs is not None, "a step could not be recorded"
    assert {(size.chunks, size.plain) for size in runner.graphs._graphs} >= {(False, True), (False, False), (True, False)}


@here
def test_graphs_are_captured_one_by_one_while_there_is_no_step_and_then_no_more() -> None:
    model = build(make("llama").to(DEVICE))
    runner = Runner(model, RunnerConfig(slots=3, blocks=8, columns=2, attention="triton", graphs=0))
    assert not runner.prepare(), "without graphs there is nothing to prepare"
    runner.graphs = graphs = sized(runner)
    while runner.prepare():
        pass
    prepared = set(graphs._graphs)
    assert {size.tokens for size in prepared if not size.chunks} == {1, 2, 3}
    assert {size.tokens for size in prepared if size.chunks} == set(graphs.tokens)
    assert not runner.prepare()
    requests = [request(i, [5 + i, 6, 7], 4, Sampler(temperature=0.5 * i, seed=i)) for i in range(3)]
    run(runner, SchedulerConfig(slots=3, blocks=8, token_budget=16, max_model_len=32), [requests])
    assert set(graphs._graphs) == prepared


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of 8 tokens are long ones. Returns how many tokens those had that attended as such; cuDNN's part torch does, where there is
    none."""
    from penstock.engine import graphs
    from penstock.engine.attention import triton

    attended = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        attended.append(len(q))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)

    monkeypatch.setattr(triton, "attend_prompt", attend)
    monkeypatch.setattr(triton, "suits_prompt", lambda *_: True)
    for module in (triton, graphs):
        monkeypatch.setattr(module, "LONG", 8)
    return attended


@here
def test_a_long_prompt_by_itself_attends_as_one_if_that_was_prepared(prompts: list[int]) -> None:
    got = []
    for prepared in (False, True):
        runner = Runner(build(make("llama").to(DEVICE)), RunnerConfig(slots=2, blocks=4, columns=2, attention="triton", graphs=0))
        runner.graphs = sized(runner)
        while prepared and runner.prepare():
            pass
        assert set(prompts) == ({16, 24, 32} if prepared else set())
        prompts.clear()
        requests = [request(0, list(range(1, 20)), 4)]
        got.append(
            [
                outcome.ids
                for outcome in run(runner, SchedulerConfig(slots=2, blocks=4, token_budget=24, max_model_len=32), [requests]).values()
            ]
        )
        assert set(prompts) == ({24} if prepared else set())
    assert got[0] == got[1]


@here
def test_what_goes_on_in_a_second_chunk_is_no_prompt_by_itself(prompts: list[int]) -> None:
    got = []
    for budget in (32, 16):
        runner = Runner(build(make("llama").to(DEVICE)), RunnerConfig(slots=2, blocks=4, columns=3, attention="triton", graphs=0))
        runner.graphs = sized(runner)
        while runner.prepare():
            pass
        prompts.clear()
        config = SchedulerConfig(slots=2, blocks=4, token_budget=budget, max_model_len=48)
        got.append([outcome.ids for outcome in run(runner, config, [[request(0, list(range(1, 29)), 4)]]).values()])
        assert prompts == [budget] * (len(runner.model.layers) - 1), "once in each layer but the last, where one token attends"
    assert got[0] == got[1]


@here
def test_where_long_prompts_cannot_be_recorded_all_else_is(prompts: list[int]) -> None:
    runner = Runner(build(make("llama").to(DEVICE)), RunnerConfig(slots=2, blocks=4, columns=2, attention="triton", graphs=0))
    runner.graphs = graphs = sized(runner)
    record, failed = graphs.record, []

    def without(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        recorded = record(step)
        if prompts:
            failed.append(prompts.pop())
            raise RuntimeError("no valid execution plans built")
        return recorded

    graphs.record = without
    while runner.prepare():
        pass
    assert failed == [32]
    assert runner.graphs is graphs
    assert {size.tokens for size in graphs._graphs if size.chunks} == set(graphs.tokens)
    run(runner, SchedulerConfig(slots=2, blocks=4, token_budget=24, max_model_len=32), [[request(0, list(range(1, 20)), 2)]])
    assert not any(size.prompt for size in graphs._graphs)


@here
def test_a_step_is_run_before_any_is_recorded() -> None:
    model = build(make("llama").to(DEVICE))
    runner = Runner(model, RunnerConfig(slots=2, blocks=4, columns=2, attention="triton", graphs=0))
    runner.graphs = graphs = sized(runner)
    record, forward, run_before = graphs.record, model.forward, list[bool]()
    recording = [False]

    def watched(*given: Any, **more: Any) -> torch.Tensor:
        run_before.append(not recording[0])
        return forward(*given, **more)

    def recorded(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        recording[0] = True
        try:
            return record(step)
        finally:
            recording[0] = False

    model.forward, graphs.record = watched, recorded  # type: ignore[method-assign]
    warm_up(runner)
    assert run_before[0]
    assert not all(run_before)
    assert runner.graphs is graphs


@here
def test_a_model_that_cannot_be_recorded_is_run_step_by_step() -> None:
    from penstock.engine.graphs import StepGraphs

    def record(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    model = build(make("llama").to(DEVICE))
    requests = [request(i, [5 + i, 6, 7], 4, Sampler(temperature=0.5 * i, seed=i)) for i in range(2)]
    got = []
    for graphs in (False, True):
        runner = Runner(model, RunnerConfig(slots=2, blocks=4, columns=2, attention="triton", graphs=0))
        if graphs:
            runner.graphs = StepGraphs(model, runner.attention, runner.last, most=32, in_flight=3, record=record)
        with pytest.warns(RuntimeWarning, match="without CUDA graphs") if graphs else nullcontext():
            outcomes = run(runner, SchedulerConfig(slots=2, blocks=4, token_budget=16, max_model_len=32), [requests])
        got.append([outcome.ids for outcome in outcomes.values()])
        assert runner.graphs is None
    assert got[0] == got[1]


@here
def test_a_size_that_memory_has_no_room_for_is_run_step_by_step_and_the_others_stay() -> None:
    model = build(make("llama").to(DEVICE))
    runner = Runner(model, RunnerConfig(slots=3, blocks=8, columns=2, attention="triton", graphs=0))
    runner.graphs = graphs = sized(runner)
    record = graphs.record

    tried = []

    def small(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        replay, out = record(step)
        if len(out) == 2:
            tried.append(out)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replay, out

    graphs.record = small
    requests = [request(i, [5 + i, 6, 7], 3 + i) for i in range(3)]
    run(runner, SchedulerConfig(slots=3, blocks=8, token_budget=16, max_model_len=32), [requests])
    assert runner.graphs is graphs
    assert {size.tokens for size in graphs._graphs if not size.chunks} == {1, 3}
    assert len(tried) == len(graphs._unfit), "each was tried once"
    assert not runner.prepare(), "where one did not fit, no others are prepared"


@here
@pytest.mark.parametrize("where", ["step", "end"])
@pytest.mark.parametrize("unjoined", [False, True])
def test_for_want_of_memory_a_step_is_recorded_again_with_all_that_can_be_had(
    where: str, unjoined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.engine import graphs

    held, freed, ended = list[weakref.ref[torch.Tensor]](), list[bool](), list[int]()

    class Graph:
        """In the place of CUDA's."""

        def capture_begin(self, **_: object) -> None: ...
        def capture_end(self) -> None:
            ended.append(len(held))
            if len(held) == 1 and where == "end":
                raise RuntimeError("CUDA error: out of memory")
            if len(held) == 1 and unjoined:
                raise RuntimeError("CUDA error: capturing stream has unjoined work")

        def replay(self) -> None: ...

    def step() -> torch.Tensor:
        activation = torch.zeros(9)
        held.append(weakref.ref(activation))
        if len(held) == 1 and where == "step":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return activation

    for name, fake in (
        ("graph_pool_handle", lambda: (0, 1)), ("Stream", lambda *_, **__: None), ("stream", lambda _: nullcontext()), ("CUDAGraph", Graph),
        ("empty_cache", lambda: freed.append(held[0]() is None)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    _, out = graphs.CudaRecord(torch.device("cpu"))(step)
    assert held[1]() is out
    assert freed == [True]
    assert ended == [1, 2]


@here
@pytest.mark.parametrize("name", ["llama", "qwen3", "biases"])
@pytest.mark.parametrize("tokens", [2, 40])  # on either side of where products change on a GPU
def test_in_half_precision_it_errs_no_more_than_transformers(name: str, tokens: int) -> None:
    ours, theirs = errors_of(name, tokens)
    assert ours.mean() < 1.2 * theirs.mean()


def errors_of(name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squares of what the logits of many tokens are off, ours and those of transformers: bfloat16 on a GPU, else float16."""
    from penstock.engine.attention.triton import TritonAttention

    dtype = torch.bfloat16 if GPU else torch.float16
    module = make(name, dtype).to(DEVICE)
    model = build(module)
    pool = KVPool(model.layers, 3, 16, model.dtype, DEVICE)
    backend = TritonAttention(pool, model.layers, slots=1, columns=3)
    model.attach(pool, backend)
    zero, every = np.zeros(1, np.int32), np.arange(3, dtype=np.int32)
    rows = StepRows(zero, zero, np.array([tokens], np.int32), 0, np.array([[1, 0, 2]], np.int32), (0 * every, every))
    positions = rows.positions()
    columns = backend.prepare(rows, positions, rows.places(positions, 16)) | {"sources": positions, "positions": positions}
    generator = torch.Generator().manual_seed(5)
    errors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    twin = make(name, dtype).to(DEVICE).double()
    for _ in range(8):
        ids = torch.randint(1, 131, (tokens,), generator=generator).to(DEVICE)
        with torch.inference_mode():
            backend.begin({key: torch.from_numpy(value.astype(np.int64)).to(DEVICE) for key, value in columns.items()})
            logits = model.forward(ids, torch.from_numpy(positions).long().to(DEVICE), None)
        exact = twin(ids[None]).logits[0]
        for which, got in enumerate((logits, module(ids[None]).logits[0])):
            errors[which].append((got.double() - exact).square().mean(-1))
    return torch.cat(errors[0]), torch.cat(errors[1])
