"""Mixed batches of adapters with the Triton kernels, in steps that are filled up to sizes: the tokens are those of torch's operations."""

from __future__ import annotations

import torch

from penstock.engine.lora.residency import Load
from penstock.engine.model.native import NativeModel
from penstock.engine.request import Adapter, Request, Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from ..engine.driver import request, run  # noqa: TID252
from ..engine.interpreted import GPU, apart, assert_passes, here  # noqa: TID252
from .test_fused import build, sized
from .test_native import make

CONFIG = SchedulerConfig(slots=3, blocks=12, token_budget=16, max_model_len=48, adapter_pages=12)
RANKS = {b"low": 4, b"one": 16, b"more": 40}


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


class Adapted:
    """A runner and random adapters of its model; `rank` of one of them may be another."""

    def __init__(self, model: NativeModel, *, triton: bool, ranks: dict[bytes, int]) -> None:
        from penstock.engine.lora.segments import SegmentAdapters
        from penstock.engine.lora.triton import TritonAdapters

        config = RunnerConfig(slots=3, blocks=12, columns=3, attention="triton" if triton else "gather", adapter_pages=12, graphs=0)
        runner = self.runner = Runner(model, config)
        runner.pool.fill(float("nan"))
        adapters = runner.adapters
        assert adapters is not None
        self.adapters = adapters
        adapters.pool.data.fill_(float("nan"))
        adapters.backend = TritonAdapters(adapters.pool) if triton else SegmentAdapters(adapters.pool)
        model.adapt(adapters.layout, adapters.backend)
        if triton:
            runner.graphs = sized(runner, adapters.backend, most=16)
        self.known: dict[bytes, Adapter] = {}
        self.content: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        draw = torch.Generator().manual_seed(3)
        for digest, rank in ranks.items():
            weights = {
                site.name: (
                    torch.randn(rank, site.in_features, generator=draw) / site.in_features**0.5,
                    torch.randn(site.out_features, rank, generator=draw) / rank**0.5,
                )
                for number, site in enumerate(adapters.layout.sites)
                if digest != b"low" or number % 3
            }
            data, used = adapters.layout.lay_out(weights, model.dtype)
            self.known[digest], self.content[digest] = Adapter(digest, len(data)), (data, used)

    def load(self, load: Load) -> None:
        self.adapters.write(load.pages, *self.content[load.adapter.digest])

    def requests(self) -> list[Request]:
        names = [None, b"low", b"one", None, b"more", b"one", b"low"]
        samplers = [Sampler(temperature=0.5 * (number % 2), seed=number) for number in range(len(names))]
        samplers[5] = Sampler(presence_penalty=0.5)  # which the sampling in a graph does not know
        return [
            request(number, [1 + (3 * number + at) % 120 for at in range(length)], 4, samplers[number], adapter=self.known.get(name or b""))
            for number, (name, length) in enumerate(zip(names, (3, 20, 17, 5, 8, 9, 1), strict=True))
        ]

    def run(self, first: int = 0, last: int = 7) -> list[list[int]]:
        return [outcome.ids for outcome in run(self.runner, CONFIG, [self.requests()[first:last]], load=self.load).values()]


@here
def test_a_run_in_graphs_gives_the_tokens_of_a_plain_one() -> None:
    got = []
    for triton in (False, True):
        adapted = Adapted(build(make("qwen3").to("cuda" if GPU else "cpu")), triton=triton, ranks=RANKS)
        got.append(adapted.run())
    assert got[0] == got[1]
    assert len({tuple(ids) for ids in got[0]}) == len(got[0])
    graphs = adapted.runner.graphs
    assert graphs is not None, "a step could not be recorded"
    found = [size for size in graphs._graphs if size.mix is not None]
    assert {size.mix.pages for size in found if size.mix is not None} == {1, 4}
    assert {size.plain for size in found} == {size.chunks for size in found} == {True, False}


@here
def test_an_adapter_of_more_pages_than_graphs_have_room_for_is_run_step_by_step() -> None:
    got = []
    for triton in (False, True):
        adapted = Adapted(build(make("llama").to("cuda" if GPU else "cpu")), triton=triton, ranks=RANKS | {b"more": 70})
        got.append(adapted.run(3, 6))
    assert got[0] == got[1]


@here
def test_graphs_for_adapters_are_captured_while_idle_once_there_were_some() -> None:
    adapted = Adapted(build(make("llama").to("cuda" if GPU else "cpu")), triton=True, ranks={b"low": 4, b"one": 16, b"more": 16})
    graphs = adapted.runner.graphs
    assert graphs is not None
    while adapted.runner.prepare():
        pass
    assert {size.mix for size in graphs._graphs} == {None}
    adapted.run(2, 4)
    while adapted.runner.prepare():
        pass
    (mix,) = graphs._mixes
    assert {size.tokens for size in graphs._graphs if size.mix == mix and not size.chunks} == {1, 2, 3}
    assert {size.tokens for size in graphs._graphs if size.mix == mix and size.chunks} == set(graphs.tokens)
    assert not adapted.runner.prepare()
