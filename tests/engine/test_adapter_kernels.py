"""The Triton kernels that add adapters to products against float64, on fresh random inputs, whatever mix of adapters a step has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns
from penstock.engine.lora.base import AdaptedRows, Pages
from penstock.engine.lora.layout import RANKS, PagePool, Place, Site, layout_of

from .interpreted import DEVICE, GPU, apart, assert_passes, here
from .laying import lay_out

if TYPE_CHECKING:
    from penstock.engine.lora.triton import TritonAdapters

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GROUPS = [  # one to three products of an input, in sizes that are and that are not multiples of anything
    (Site("q", 128, 160), Site("k", 128, 64), Site("v", 128, 64)),
    (Site("o", 333, 75),),
    (Site("gate", 75, 141), Site("up", 75, 141)),
    (Site("down", 530, 270),),
]
RANKS_OF: dict[str, dict[str, int]] = {
    "low": {"q": 4, "v": 4},
    "all": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 8),
    "page": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 16),
    "pattern": {"q": 33, "k": 16, "o": 17, "up": 20, "down": 3},
    "high": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 64),
    "highest": {"k": 90, "gate": 70, "up": 4, "down": 100},
}


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


class Adapters:
    """A pool with all adapters of `RANKS_OF`, in random pages. Whatever they do not use is NaN."""

    def __init__(self, dtype: torch.dtype, names: Sequence[str] = tuple(RANKS_OF)) -> None:
        self.layout, self.dtype = layout_of(GROUPS), dtype
        free = torch.randperm(20).tolist()
        self.pool = PagePool(self.layout, 20, dtype, DEVICE)
        self.pool.data.fill_(float("nan"))
        self.pool.used.fill_(RANKS)
        self.weights: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.pages: dict[str, Pages] = {"": ()}
        for name in names:
            ranks = RANKS_OF[name]
            self.weights[name] = {
                site.name: (
                    (torch.randn(ranks[site.name], site.in_features) / site.in_features**0.5).to(dtype),
                    (torch.randn(site.out_features, ranks[site.name]) / ranks[site.name] ** 0.5).to(dtype),
                )
                for site in self.layout.sites
                if site.name in ranks
            }
            data, used = lay_out(self.layout, self.weights[name], dtype)
            self.pages[name] = tuple(free.pop() for _ in data)
            self.pool.write(self.pages[name], data, used)
            for page, rows in zip(self.pages[name], used.tolist(), strict=True):
                for place in self.layout.places:
                    for number, matrices in enumerate(self.pool.matrices(place, page)):
                        for matrix in matrices:
                            matrix[rows[place.site + number] :] = float("nan")

    def backend(self, rows: int | None) -> TritonAdapters:
        from penstock.engine.lora.triton import TritonAdapters

        return TritonAdapters(self.pool, rows=rows)

    def rows(self, counts: Sequence[tuple[str, int]], samples: Sequence[int] | None = None) -> AdaptedRows:
        """Rows of a step: their adapters, and how many tokens they have."""
        firsts = np.cumsum([0, *(count for _, count in counts)], dtype=np.int32)
        pages = [self.pages[name] for name, _ in counts]
        return AdaptedRows(pages, firsts, None if samples is None else np.array(samples, np.int32))

    def check(self, backend: TritonAdapters, place: Place, of_tokens: Sequence[str]) -> None:
        """What is added to a product of random tokens is exact, and what no adapter changes stays as it is, bit for bit."""
        x = torch.randn(len(of_tokens), place.in_features + 8).to(self.dtype).to(DEVICE)[:, : place.in_features]
        y = torch.randn(len(of_tokens), sum(place.outs)).to(self.dtype)
        got = y.clone().to(DEVICE)
        backend.add(place, x, got)
        exact, expected, left = x.double().cpu(), y.double(), torch.ones(y.shape, dtype=torch.bool)
        for token, name in enumerate(of_tokens):
            end = 0
            for site in place.group:
                begin, end = end, end + site.out_features
                if name and site.name in self.weights[name]:
                    a, b = self.weights[name][site.name]
                    expected[token, begin:end] += (exact[token] @ a.double().t()) @ b.double().t()
                    left[token, begin:end] = False
        assert torch.equal(got.cpu()[left], y[left])
        torch.testing.assert_close(got.double().cpu(), expected, atol=2 * TOLERANCE[self.dtype], rtol=2 * TOLERANCE[self.dtype])


def send(columns: Columns) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column.astype(np.int64)).to(DEVICE) for name, column in columns.items()}


def begin(backend: TritonAdapters, rows: AdaptedRows) -> None:
    backend.begin(send(backend.prepare(rows)))
    spoil(backend)


def spoil(backend: TritonAdapters) -> None:
    """What shrink does not write must not be read."""
    assert backend.step is not None
    backend.step.sums.fill_(float("nan"))


def tokens_of(counts: Sequence[tuple[str, int]]) -> list[str]:
    return [name for name, count in counts for _ in range(count)]


STEPS: dict[str, list[tuple[str, int]]] = {
    "one": [("page", 1)],
    "decodes": [("low", 1), ("", 1), ("high", 1), ("all", 1), ("low", 1), ("", 1), ("all", 1)],
    "one page": [("page", 1), ("all", 5), ("", 2), ("low", 1), ("page", 30), ("", 3), ("all", 15), ("page", 1)],
    "prompts": [("", 4), ("pattern", 21), ("low", 1), ("", 1), ("all", 17), ("pattern", 26)],
    "highest": [("highest", 2), ("all", 1), ("", 1), ("highest", 3), ("pattern", 1)],
    "base": [("", 3)],
}


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "rows"), [*((name, 16) for name in STEPS), ("prompts", 64), ("highest", 64), ("base", 64)])
def test_what_adapters_add_is_exact_in_any_mix(name: str, rows: int, dtype: torch.dtype) -> None:
    adapters, counts = Adapters(dtype), STEPS[name]
    backend, of_tokens = adapters.backend(rows), tokens_of(counts)
    begin(backend, adapters.rows(counts))
    for place in adapters.layout.places:
        adapters.check(backend, place, of_tokens)
    backend.narrow()  # nobody said which tokens go on: all of them
    adapters.check(backend, adapters.layout.places[1], of_tokens)
    backend.end()
    assert not backend.active


@here
@pytest.mark.parametrize("samples", [[0, 3, 4, 19], [], [3]], ids=str)
def test_after_the_last_attention_only_some_tokens_are_left(samples: list[int]) -> None:
    adapters = Adapters(torch.float32)
    counts = [("high", 1), ("low", 2), ("", 1), ("all", 1), ("pattern", 15), ("low", 2)]
    backend, of_tokens = adapters.backend(None), tokens_of(counts)
    begin(backend, adapters.rows(counts, samples))
    adapters.check(backend, adapters.layout.places[0], of_tokens)
    backend.narrow()
    for place in adapters.layout.places[1:]:
        adapters.check(backend, place, [of_tokens[token] for token in samples])
    with pytest.raises(RuntimeError, match="tokens of a step that has"):
        adapters.check(backend, adapters.layout.places[0], of_tokens)


@here
@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("name", "group"), [("page", 3), ("pattern", 0)])
def test_bits_of_a_token_do_not_depend_on_the_others(name: str, group: int, dtype: torch.dtype, rows: int) -> None:
    adapters = Adapters(dtype)
    backend, place = adapters.backend(rows), adapters.layout.places[group]
    token, added = torch.randn(1, place.in_features).to(dtype), torch.randn(1, sum(place.outs)).to(dtype)
    found = []
    for before, beside, after in ((0, 0, 0), (5, 2, 1), (3, 14, 0)):
        counts = [("low", after), ("", before), (name, before), (name, 1), (name, beside), ("high", after)]
        at = after + 2 * before
        x, y = (torch.randn(len(tokens_of(counts)), width).to(dtype) for width in (place.in_features, sum(place.outs)))
        x[at], y[at] = token, added
        begin(backend, adapters.rows(counts))
        y = y.to(DEVICE)
        backend.add(place, x.to(DEVICE), y)
        found.append(y[at].cpu())
    assert not torch.equal(found[0], added[0])
    assert all(torch.equal(one, found[0]) for one in found)


@here
def test_a_launch_for_more_does_the_same_and_one_for_nothing_does_nothing() -> None:
    """A CUDA graph is recorded once, with columns of nothing, and run with any step that fits: they are filled up."""
    from penstock.engine.kernels.tiles import Cut

    adapters = Adapters(torch.float16)
    backend, groups = adapters.backend(None), adapters.layout.places[:2]
    most = Cut(tokens=24, rows=16, tiles=20, jobs=64, pages=4)
    places = backend.lengths(most, replace(most, tokens=6))

    def filled(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        found = {name: np.full(length, empty, np.int64) for name, (length, empty) in places.items()}
        for name, column in columns.items():
            found[name][: len(column)] = column
        return send(found)

    for counts, samples in (([("high", 1), ("", 2), ("all", 18), ("low", 3)], [0, 1, 8, 20, 21, 23]), ([("", 24)], [0, 1, 2, 3, 4, 5])):
        rows = adapters.rows(counts, samples)
        columns = backend.prepare(rows)
        assert columns.keys() == places.keys()
        x = [torch.randn(tokens, place.in_features, device=DEVICE).half() for place in groups for tokens in (24, 6)]
        y = [torch.randn(tokens, sum(place.outs), device=DEVICE).half() for place in groups for tokens in (24, 6)]
        results = []
        for sized in (False, True):
            results.append([one.clone() for one in y])
            if sized:
                backend.begin_sized(filled(columns), most, replace(most, tokens=6))
            else:
                backend.begin(send(columns))
            spoil(backend)
            for narrowed in range(2):
                for number, place in enumerate(groups):
                    backend.add(place, x[2 * number + narrowed], results[-1][2 * number + narrowed])
                backend.narrow()
        assert all(torch.equal(*both) for both in zip(*results, strict=True))
    backend.begin_sized(filled({}), most, replace(most, tokens=6))
    for place, unchanged in zip(groups, y[::2], strict=True):
        got = unchanged.clone()
        backend.add(place, torch.full((24, place.in_features), float("nan"), dtype=got.dtype, device=DEVICE), got)
        assert torch.equal(got, unchanged)


@pytest.mark.skipif(not GPU, reason="graphs are CUDA's")
def test_in_a_graph_shrink_runs_beside_the_product() -> None:
    from penstock.engine.graphs import CudaRecord

    adapters, counts = Adapters(torch.bfloat16), STEPS["one page"]
    backend, groups = adapters.backend(None), adapters.layout.places[:2]
    columns = send(backend.prepare(adapters.rows(counts)))
    x = [torch.randn(len(tokens_of(counts)), place.in_features, device=DEVICE).bfloat16() for place in groups]
    weights = [torch.randn(sum(place.outs), place.in_features, device=DEVICE).bfloat16() for place in groups]

    def multiply() -> Tensor:
        found = []
        for place, some, weight in zip(groups, x, weights, strict=True):
            backend.ahead(place, some)
            found.append(some @ weight.t())
            backend.add(place, some, found[-1])
        backend.end()
        return torch.cat(found, 1)

    backend.begin(columns)
    expected = multiply()

    def step() -> Tensor:
        backend.begin_sized(columns, backend.whole, None)
        return multiply()

    replay, out = CudaRecord(DEVICE)(step)
    for _ in range(20):
        out.zero_()
        replay()
        assert torch.equal(out, expected)


@here
@pytest.mark.parametrize("rows", [16, 64])
def test_each_adapted_token_is_in_one_tile_of_its_adapter(rows: int) -> None:
    from penstock.engine.lora.triton import cut_tokens

    adapters: list[Pages] = [(4,), (2, 9, 1), (7, 3), (5,)]
    of_tokens = torch.randint(-1, 3, (int(torch.randint(1, 400, ())),)).int().numpy()  # nobody has the last one
    cut, columns = cut_tokens(adapters, of_tokens, rows, "name")
    tiles, jobs = columns["name.tiles"].reshape(-1, 4).tolist(), columns["name.jobs"].reshape(-1, 3).tolist()
    assert tiles[0] == [cut.tiles, cut.jobs, 0, 0] == [len(tiles) - 1, len(jobs), 0, 0]
    found = np.full(len(of_tokens), -1)
    for first, count, job, pages in tiles[1:]:
        tokens = columns["name.tokens"][first : first + count]
        number = int(of_tokens[tokens[0]])
        assert 0 < count <= rows
        assert np.all(found[tokens] == -1)
        assert [tuple(line) for line in jobs[job : job + pages]] == [(page, first, count) for page in adapters[number]]
        found[tokens] = number
    assert np.array_equal(found, of_tokens)
    assert cut.pages == max((len(adapters[number]) for number in of_tokens.tolist() if number >= 0), default=0)


@here
def test_tiles_are_large_where_they_are_many_and_full() -> None:
    from penstock.engine.lora.triton import rows_for

    assert [rows_for(np.array(counts)) for counts in ([64], [1] * 64, [], [0, 0], [1] * 2000)] == [16] * 5
    assert [rows_for(np.array(counts)) for counts in ([2048], [700, 700], [8192, *[1] * 32])] == [64] * 3
