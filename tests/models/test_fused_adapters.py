"""Mixed batches of adapters with the Triton kernels, in steps that are filled up to sizes: the tokens are those of torch's operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention.base import StepRows, can_fuse
from penstock.engine.lora.residency import Load
from penstock.engine.model.decoder import ACTIVATIONS
from penstock.engine.model.linear import Linear
from penstock.engine.model.native import NativeModel
from penstock.engine.model.norm import Norm
from penstock.engine.request import Adapter, Request, Sampler
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig
from penstock.engine.staging import HostStaging

from ..engine.driver import request, run  # noqa: TID252
from ..engine.interpreted import DEVICE, GPU, apart, assert_passes, here  # noqa: TID252
from ..engine.laying import lay_out  # noqa: TID252
from .test_fused import build, sized
from .test_native import make

if TYPE_CHECKING:
    from penstock.engine.graphs import StepGraphs
    from penstock.engine.lora.triton import TritonAdapters

CONFIG = SchedulerConfig(slots=3, blocks=12, token_budget=16, max_model_len=48, adapter_pages=12)
RANKS = {b"low": 4, b"one": 16, b"more": 40}


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


def recorded(runner: Runner, backend: TritonAdapters) -> StepGraphs:
    from penstock.engine.graphs import StepGraphs

    assert can_fuse(runner.attention)
    return StepGraphs(runner.model, runner.attention, runner.last, most=16, in_flight=3, adapters=backend)


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
            runner.graphs = recorded(runner, adapters.backend) if GPU else sized(runner, adapters.backend, most=16)
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
            data, used = lay_out(adapters.layout, weights, model.dtype)
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
    first = {(size.mix.rows, size.mix.pages, size.chunks, size.tokens) for size in graphs._graphs if size.mix is not None}
    assert first == {(rows, pages, *kind) for rows in (16, 64) for pages in (1, 4) for kind in ((True, 16), (False, 3))}
    adapted.run(2, 4)
    while adapted.runner.prepare():
        pass
    (mix,) = graphs._mixes
    assert {size.tokens for size in graphs._graphs if size.mix == mix and not size.chunks} == {1, 2, 3}
    assert {size.tokens for size in graphs._graphs if size.mix == mix and size.chunks} == set(graphs.tokens)
    assert not adapted.runner.prepare()


@here
@pytest.mark.skipif(GPU, reason="in the place of a kernel that needs a GPU")
@pytest.mark.parametrize("name", ["qwen3", "biases"])
def test_steps_of_few_rows_begin_what_adapters_add_with_their_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.engine.kernels import few_rows
    from penstock.engine.kernels.shrink import shrink_rows

    begun = 0

    def multiply(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None = None, add: Tensor | None = None,
        activation: str | None = None, shrink: few_rows.Begun | None = None,
    ) -> Tensor:  # fmt: skip
        nonlocal begun
        x = x if norm is None else norm(x)
        y = F.linear(x, weight, bias)
        if shrink is not None:
            begun += 1
            assert activation is None
            assert shrink_rows(x, shrink.pool, shrink.place, shrink.step, processors=4) == 1
        if activation is not None:
            y = ACTIVATIONS[activation](y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :]
        return y if add is None else y + add

    expected = Adapted(build(make(name)), triton=False, ranks=RANKS).run()
    monkeypatch.setattr("penstock.engine.model.linear.can_pack", lambda weight: False)
    monkeypatch.setattr(few_rows, "multiply_few", multiply)
    monkeypatch.setattr(few_rows, "suits_few", lambda weight: True)
    assert Adapted(build(make(name)), triton=True, ranks=RANKS).run() == expected
    assert begun > 0


@here
@pytest.mark.skipif(GPU, reason="on a GPU many rows take that way, and the other tests are of them")
def test_products_add_to_the_stream_what_adapters_add_too(monkeypatch: pytest.MonkeyPatch) -> None:
    added = 0

    def add(product: Linear, h: Tensor, x: Tensor) -> Tensor:
        nonlocal added
        added += 1
        return first_add(product, h, x)

    first_add = Linear.add
    expected = Adapted(build(make("qwen3")), triton=False, ranks=RANKS).run()
    monkeypatch.setattr("penstock.engine.model.linear.can_pack", lambda weight: False)
    monkeypatch.setattr(Linear, "add", add)
    adapted = Adapted(build(make("qwen3")), triton=True, ranks=RANKS)
    assert not added
    assert adapted.run() == expected
    assert added > 0


@here
@pytest.mark.skipif(not GPU, reason="CUDA C++")
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_step_of_few_rows_in_bfloat16_is_as_exact_as_one_by_the_library(name: str) -> None:
    exact, model = build(make(name, torch.bfloat16).float().cuda()), build(make(name, torch.bfloat16).cuda())
    ranks = {b"one": 16, b"more": 40}
    expected = logits_of(Adapted(exact, triton=True, ranks=ranks))
    few = Adapted(model, triton=True, ranks=ranks)
    assert model.few
    got = logits_of(few)
    model.few = 0
    by_library = logits_of(few)
    error, least = ((one.double() - expected.double()).square().mean().sqrt() for one in (got, by_library))
    assert not torch.equal(got, by_library)
    assert error < 1.3 * least + 1e-3


@here
@pytest.mark.skipif(not GPU, reason="CUDA C++")
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_graphs_of_few_rows_in_bfloat16_give_the_tokens_of_steps_without(name: str) -> None:
    got = []
    for graphs in (True, False):
        model = build(make(name, torch.bfloat16).cuda())
        adapted = Adapted(model, triton=True, ranks=RANKS)
        assert model.few
        if not graphs:
            adapted.runner.graphs = None
        got.append(adapted.run())
        assert (adapted.runner.graphs is not None) == graphs, "a step could not be recorded"
    assert got[0] == got[1]


def logits_of(adapted: Adapted) -> Tensor:
    """Of five tokens in three slots: of the base model, and of two adapters."""
    runner, adapters = adapted.runner, adapted.adapters
    pages: dict[bytes, tuple[int, ...]] = {}
    for digest, (data, used) in adapted.content.items():
        pages[digest] = tuple(range(sum(map(len, pages.values())), sum(map(len, pages.values())) + len(data)))
        adapters.write(pages[digest], data, used)
    for slot, digest in enumerate((b"", b"one", b"more")):
        adapters.fill(slot, pages.get(digest, ()))
    slots, counts = np.arange(3, dtype=np.int32), np.array([1, 2, 2], np.int32)
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    written = np.repeat(slots, 3), np.tile(slots, 3)
    rows = StepRows(slots, np.zeros(3, np.int32), counts, 0, table, written)
    positions = rows.positions()
    columns = {"sources": slots[:0], "positions": positions}
    columns |= runner.attention.prepare(rows, positions, rows.places(positions, runner.pool.block_size)) | adapters.prepare(rows, None)
    sent = {name: column.to(DEVICE) for name, column in HostStaging().send(columns).items()}
    with torch.inference_mode(), adapters.step(sent):
        runner.attention.begin(sent)
        return runner.model.forward(torch.tensor([3, 5, 8, 9, 2], device=DEVICE), sent["positions"], None).clone()
