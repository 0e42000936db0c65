"""Products of a few rows, with what surrounds them and what adapters add, against float64: on a GPU if there is one, else emulated."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine.kernels import few_rows
from penstock.engine.kernels.few_rows import Begun, Blocks, Stages, multiply_few, stages_for
from penstock.engine.kernels.tensor_map import can_copy_boxes
from penstock.engine.kernels.tiles import SMALL, Tiles
from penstock.engine.lora.layout import RANKS, PagePool, Place, Site, layout_of
from penstock.engine.lora.triton import WHOLE, cut_tokens
from penstock.engine.model.norm import Norm

from .emulating import emulated, emulated_boxes, emulated_bulk
from .interpreted import DEVICE, GPU
from .multiplying import AROUND, check_product, rms

pytestmark = pytest.mark.skipif(not GPU and shutil.which("g++") is None, reason="neither a GPU nor a compiler of C++")
SIZES = [(96, 70), (1024, 4100), (2080, 136)] if GPU else [(96, 70), (512, 36), (2080, 22)]  # of a few blocks, where they are emulated
TOLERANCE = 4e-2


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(few_rows, "_kernel", emulated)
        monkeypatch.setattr(few_rows, "_bulk_kernel", emulated_bulk)
        monkeypatch.setattr(few_rows, "map_boxes", emulated_boxes)
        monkeypatch.setattr(few_rows, "can_copy_boxes", lambda _: True)


@pytest.fixture
def bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights are large."""
    if GPU and not can_copy_boxes(DEVICE):
        pytest.skip("the device does not copy in bulk")
    monkeypatch.setattr(few_rows, "LARGE", 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 11, 29])
@pytest.mark.parametrize(("inner", "outer"), SIZES)
@pytest.mark.parametrize(("norm", "add", "activation"), AROUND)
def test_a_product_of_a_few_rows_with_what_surrounds_it(
    inner: int, outer: int, rows: int, norm: int, add: int, activation: str | None, bias: bool
) -> None:
    check_product(
        multiply_few, rows, inner, outer, torch.bfloat16, TOLERANCE, bias=bias, norm=norm, add=add, activation=activation
    )


@pytest.mark.parametrize("rows", [3, 27])
@pytest.mark.parametrize("cut", [Blocks(8, 2), Blocks(4, 2)], ids=str)
@pytest.mark.parametrize(("norm", "add", "activation"), [(1, 0, None), (2, 0, "silu"), (0, 1, None)])
def test_a_product_that_is_cut_in_any_way(
    cut: Blocks, rows: int, norm: int, add: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "blocks_for", lambda *_: cut)
    check_product(multiply_few, rows, 2080, 140, torch.bfloat16, TOLERANCE, bias=True, norm=norm, add=add, activation=activation)


@pytest.mark.usefixtures("bulk")
@pytest.mark.parametrize("rows", [7, 13])
@pytest.mark.parametrize(("inner", "outer"), SIZES[::2])
@pytest.mark.parametrize(("norm", "add", "activation"), AROUND)
def test_a_product_with_bulk_copies(inner: int, outer: int, rows: int, norm: int, add: int, activation: str | None) -> None:
    bias = rows == 7
    check_product(
        multiply_few, rows, inner, outer, torch.bfloat16, TOLERANCE, bias=bias, norm=norm, add=add, activation=activation
    )


@pytest.mark.usefixtures("bulk")
@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("cut", [Stages(8, 1, 2, 2), Stages(2, 4, 7, 3), Stages(4, 2, 1, 1)], ids=str)
@pytest.mark.parametrize(("norm", "add", "activation"), [(1, 0, None), (2, 0, "silu"), (0, 1, None)])
def test_stages_of_any_size(
    cut: Stages, rows: int, norm: int, add: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "stages_for", lambda *_: cut)
    check_product(multiply_few, rows, 2080, 140, torch.bfloat16, TOLERANCE, bias=True, norm=norm, add=add, activation=activation)


@pytest.mark.parametrize("tiles", [1, 2])
def test_two_blocks_of_any_stages_fit_a_multiprocessor(tiles: int) -> None:
    for columns in range(16, 200_000, 1000):
        cut = stages_for(columns, tiles, 132)
        assert cut.stages >= 2
        assert cut.along * cut.across == few_rows.BULK_WARPS
        assert cut.shared(tiles) <= few_rows.SHARED
        assert cut.shared(tiles) >= cut.along * 8 * tiles * (16 * cut.groups + 4) * 4  # the sums take the place of the stages


@pytest.mark.skipif(not GPU, reason="what suits the kernel is on a GPU")
def test_what_suits_the_kernel() -> None:
    weight = torch.zeros(64, 96, dtype=torch.bfloat16, device=DEVICE)
    assert few_rows.suits_few(weight)
    assert not few_rows.suits_few(weight.float())
    assert not few_rows.suits_few(weight[:, :64])
    assert not few_rows.suits_few(weight[:, :60].contiguous())
    assert not few_rows.suits_few(weight.cpu())


class Adapters:
    """Adapters of one group of products, in random pages: `ranks` says how many rows of A each has for each of the products. There is room
    for so many jobs `more`, as in a CUDA graph."""

    def __init__(self, place: Place, ranks: Sequence[Sequence[int]], of_tokens: Sequence[int], pool: PagePool, more: int) -> None:
        self.place, self.pool, free = place, pool, torch.randperm(len(pool.data)).tolist()
        pages = [tuple(free.pop() for _ in range(-(-max(each) // RANKS))) for each in ranks]
        for mine, each in zip(pages, ranks, strict=True):
            for number, page in enumerate(mine):
                for part, rank in enumerate(each):
                    rows = min(max(rank - number * RANKS, 0), RANKS)
                    pool.used[page, place.site + part] = rows
                    a = torch.randn(rows, place.in_features) / place.in_features**0.5
                    pool.matrices(place, page)[part][0][:rows] = a.to(pool.data)
        cut, columns = cut_tokens(pages, np.array(of_tokens, np.int32), SMALL, WHOLE)
        self.jobs = columns[f"{WHOLE}.jobs"].reshape(-1, 3).tolist()
        self.tokens = columns[f"{WHOLE}.tokens"].tolist()
        sent = [torch.from_numpy(columns[f"{WHOLE}.{name}"].astype(np.int64)) for name in ("tokens", "jobs", "tiles")]
        # Beyond what there is, columns of a graph have what they had before.
        sent = [torch.cat((column, column[-3 * more :] if more else column[:0])).to(DEVICE) for column in sent]
        cut = type(cut)(cut.tokens, cut.rows, cut.tiles + more, cut.jobs + more, cut.pages)
        sums = torch.full((cut.jobs, len(place.group), SMALL, RANKS), float("nan"), device=DEVICE)
        self.step = Tiles(*sent, sums, cut)

    def check(self, x: Tensor) -> None:
        """The sums are those of x `[tokens, in]`, float64; and nothing is written where there is no job, token or rank."""
        expected = torch.full(self.step.sums.shape, float("nan"), dtype=torch.float64)
        for number, (page, first, count) in enumerate(self.jobs):
            for part, (a, _) in enumerate(self.pool.matrices(self.place, page)):
                rows = int(self.pool.used[page, self.place.site + part])
                if rows:
                    expected[number, part, :count, :rows] = x[self.tokens[first : first + count]] @ a[:rows].double().cpu().t()
                    expected[number, part, :count, rows:] = 0.0
        torch.testing.assert_close(self.step.sums.double().cpu(), expected, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("cut", [None, Blocks(8, 2), Stages(4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize(
    ("ranks", "of_tokens"),
    [
        ([(16, 16, 16)], [0]),
        ([(4, 0, 8), (0, 40, 33)], [1, -1, 0, 0, 1, 1]),
        ([(16, 3, 16), (8, 8, 0), (0, 0, 16)], [*range(-1, 3)] * 4),
        ([(16, 16, 16), (1, 1, 1)], [0] * 20 + [-1] + [1] * 8),
    ],
    ids=["one", "pages", "many", "tiles"],
)
@pytest.mark.parametrize(("inner", "norm", "add"), [(96, 1, False), (512, 0, True), (2080, 2, False)])
def test_what_adapters_add_begins_with_the_product(
    inner: int, norm: int, add: bool, ranks: Sequence[Sequence[int]], of_tokens: Sequence[int], more: int,
    cut: Blocks | Stages | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if isinstance(cut, Blocks):
        monkeypatch.setattr(few_rows, "blocks_for", lambda *_: cut)
    elif cut is not None:
        if len(of_tokens) > few_rows.BULK_FEW or (GPU and not can_copy_boxes(DEVICE)):
            pytest.skip("not with bulk copies")
        monkeypatch.setattr(few_rows, "LARGE", 0)
        monkeypatch.setattr(few_rows, "stages_for", lambda *_: cut)
    layout = layout_of([(Site("before", 32, 8),), (Site("q", inner, 40), Site("k", inner, 8), Site("v", inner, 8))])
    pool = PagePool(layout, 9, torch.bfloat16, DEVICE)
    pool.data.fill_(float("nan"))
    pool.used.fill_(RANKS)
    adapters, rows = Adapters(layout.places[1], ranks, of_tokens, pool, more), len(of_tokens)
    x, weight = torch.randn(rows, inner + 32).bfloat16().to(DEVICE)[:, :inner], (torch.randn(56, inner) / inner**0.5).bfloat16()
    scale, stream = torch.randn(inner) if norm == 2 else torch.randn(inner).bfloat16(), torch.randn(rows, 56).bfloat16()
    around = {"norm": Norm(scale.to(DEVICE), 1e-6) if norm else None, "add": stream.to(DEVICE) if add else None}
    got = multiply_few(x, weight.to(DEVICE), None, **around, shrink=Begun(pool, layout.places[1], adapters.step))  # type: ignore[arg-type]
    assert torch.equal(got, multiply_few(x, weight.to(DEVICE), None, **around))  # type: ignore[arg-type]
    exact = x.double().cpu()
    adapters.check(rms(exact, scale.double()) if norm else exact)
