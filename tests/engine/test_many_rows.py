"""Products of many rows, with a gate after them, against float64: on a GPU that has tensor cores of their kind, else emulated."""

from __future__ import annotations

import shutil

import pytest
import torch

from penstock.engine.kernels import many_rows
from penstock.engine.kernels.many_rows import multiply_many, suits_many
from penstock.engine.model.decoder import ACTIVATIONS

from .emulating import emulated_boxes, emulated_many
from .interpreted import DEVICE, GPU

pytestmark = pytest.mark.skipif(not GPU and shutil.which("g++") is None, reason="neither a GPU nor a compiler of C++")
SIZES = [(1000, 1048, 600), (8192, 4096, 14336), (3, 64, 8), (128, 8192, 264)] if GPU else [(300, 328, 200), (520, 72, 264), (3, 40, 8)]
TOLERANCE = 2e-2


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(many_rows, "_kernel", emulated_many)
        monkeypatch.setattr(many_rows, "map_boxes", emulated_boxes)
        monkeypatch.setattr(many_rows, "processors_of", lambda _: 3)  # one cluster has all tiles
    elif not suits_many(torch.empty(8, 8, dtype=torch.bfloat16, device=DEVICE)):
        pytest.skip("the device has other tensor cores")


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("rows", "inner", "outs"), SIZES)
def test_a_product_of_many_rows(
    rows: int, inner: int, outs: int, activation: str | None, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_rows, "CLUSTER", cluster)
    many_rows._kernel.cache_clear()
    check(rows, inner, outs, activation, 1.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gate_far_from_zero_is_open_or_shut(activation: str) -> None:
    many_rows._kernel.cache_clear()
    check(3, 64, 264, activation, 60.0)


def check(rows: int, inner: int, outs: int, activation: str | None, scale: float) -> None:
    x = (scale * torch.randn(rows, 2 * inner)).bfloat16().to(DEVICE)[:, :inner]  # rows lie apart
    weight = (torch.randn(outs if activation is None else 2 * outs, inner) / inner**0.5).bfloat16().to(DEVICE)
    expected = x.double() @ weight.double().t()
    if activation is not None:
        expected = ACTIVATIONS[activation](expected[:, :outs]) * expected[:, outs:]
    torch.testing.assert_close(multiply_many(x, weight, activation).double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
