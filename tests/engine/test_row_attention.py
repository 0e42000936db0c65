"""Attention of decodes a row at a time, from the fused product on, against float64: on a GPU if there is one, else emulated."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine.attention.base import LayerShape
from penstock.engine.kernels import row_attention
from penstock.engine.kernels.decode_attention import Decodes, Turns
from penstock.engine.kernels.row_attention import Split, attend_rows, split_for, suits_rows
from penstock.engine.kernels.tensor_map import can_copy_boxes

from .attending import make_step, naive
from .emulating import emulated_boxes, emulated_rows
from .interpreted import DEVICE, GPU
from .multiplying import rms

pytestmark = pytest.mark.skipif(not GPU and shutil.which("g++") is None, reason="neither a GPU nor a compiler of C++")
EPSILON = 1e-6
TOLERANCE = 2e-2
LONGEST = 3000 if GPU else 300
NOWHERE = 2  # rows of a graph that are nobody's


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(row_attention, "_kernel", emulated_rows)
        monkeypatch.setattr(row_attention, "map_boxes", emulated_boxes)


def turned(x: Tensor, weights: Tensor | None, positions: Tensor, pairs: int) -> Tensor:
    """Heads `[rows, heads, dim]` normed and turned as a model of bfloat16 does it."""
    x = x.double()
    if weights is not None:
        x = (rms(x, weights.double())).bfloat16().double()
    angles = (positions.double()[:, None] * 0.9 ** torch.arange(pairs))[:, None]
    one, other, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin(), rest), -1)


@pytest.mark.parametrize(
    ("norm", "splits", "bulk"), [(False, 1, False), (True, 1, True), (True, 2, False), (False, 2, True), (False, 16, False)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "size", "pairs", "window"),
    [(16, 8, 128, 16, 64, None), (8, 2, 128, 16, 64, 40), (14, 2, 64, 32, 32, None), (8, 1, 64, 16, 16, 7), (3, 3, 128, 32, 32, None)],
)
def test_rows_attend_with_heads_of_the_product(
    heads: int, kv_heads: int, dim: int, size: int, pairs: int, window: int | None, norm: bool, splits: int,
    bulk: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if GPU and bulk and not can_copy_boxes(DEVICE):
        pytest.skip("the device does not copy in bulk")
    monkeypatch.setattr(row_attention, "copies_keys", lambda *_: bulk)
    monkeypatch.setattr(row_attention, "split_for", lambda *_: Split(splits, 1 if splits > 2 else 8))
    positions = [0, 1, 15, 16, 17, 130, LONGEST]
    shape = LayerShape(heads, kv_heads, dim, dim, dim**-0.5, window=window)
    step = make_step(shape, positions, [], block_size=size, dtype=torch.bfloat16, begun_as_zero=False, seed=heads)
    (keys, values), rows = step.pool.layers[0], len(positions)
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(rows + NOWHERE, width + 8).bfloat16()[:, :width]
    weights = torch.randn(heads + kv_heads, dim).bfloat16() if norm else None
    angles = torch.arange(LONGEST + 1).double()[:, None] * 0.9 ** torch.arange(pairs)
    places = np.append(step.rows.places(step.rows.positions(), size), [-1] * NOWHERE)
    slots, starts = (np.append(column, [0] * NOWHERE) for column in (step.rows.slots, step.rows.starts))
    columns = [torch.from_numpy(column.astype(np.int64)).to(DEVICE) for column in (slots, starts, places, np.array([rows]))]
    decodes = Decodes(columns[0], columns[1], torch.from_numpy(step.rows.table).to(DEVICE), columns[3], rows + NOWHERE, 1)
    tables = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    turns = Turns(None if weights is None else weights.to(DEVICE), EPSILON, *tables, columns[2])
    out = torch.full((rows + NOWHERE, heads, dim), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    pool = [part.to(DEVICE, copy=True) for part in (keys, values)]
    tickets = torch.zeros((rows + NOWHERE) * kv_heads, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second launch finds tickets as the first has left them
        attend_rows(qkv.to(DEVICE).unflatten(1, (-1, dim)), *pool, out, decodes, tickets, shape, turns)

    split = qkv.unflatten(1, (-1, dim))[:rows]
    both = turned(split[:, : heads + kv_heads], weights, torch.tensor(positions), pairs).bfloat16()
    for row, position in enumerate(positions):
        slot = int(step.rows.slots[row])
        at = torch.tensor([int(step.rows.table[slot, p // size]) for p in range(position + 1)]), torch.arange(position + 1) % size
        keys[at[0][-1], :, at[1][-1]], values[at[0][-1], :, at[1][-1]] = both[row, heads:], split[row, heads + kv_heads :]
        expected = naive(shape, both[row, :heads], keys[at[0], :, at[1]], values[at[0], :, at[1]], None)
        torch.testing.assert_close(out[row].double().cpu(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    for got, expected in zip(pool, (keys, values), strict=True):  # nothing else is written
        torch.testing.assert_close(got.cpu(), expected, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
    assert out[rows:].isnan().all()
    assert not tickets.any()


@pytest.mark.skipif(not GPU, reason="what suits the kernel is on a GPU")
def test_what_suits_the_kernel() -> None:
    def suits(shape: LayerShape, dtype: torch.dtype = torch.bfloat16, size: int = 16, norm: torch.dtype | None = None) -> bool:
        x = torch.zeros(1, 1, shape.head_dim, dtype=dtype, device=DEVICE)
        turns = Turns(None if norm is None else x[0].to(norm), EPSILON, x, x, x)
        return suits_rows(shape, turns, x, torch.zeros(1, shape.kv_heads, size, shape.head_dim, dtype=dtype, device=DEVICE))

    assert suits(LayerShape(16, 8, 128, 128, 1.0, window=9), size=32, norm=torch.bfloat16)
    assert not suits(LayerShape(16, 8, 128, 128, 1.0), norm=torch.float32)
    assert not suits(LayerShape(16, 8, 128, 128, 1.0), dtype=torch.float16)
    assert not suits(LayerShape(16, 8, 128, 128, 1.0), size=8)
    assert not suits(LayerShape(18, 2, 128, 128, 1.0))
    assert not suits(LayerShape(16, 8, 96, 96, 1.0))
    assert not suits(LayerShape(16, 8, 128, 128, 1.0, softcap=30.0))
    assert not suits(LayerShape(16, 8, 128, 128, 1.0, sinks=True))


def test_keys_are_split_until_each_multiprocessor_has_some() -> None:
    small, large = LayerShape(16, 8, 128, 128, 1.0), LayerShape(32, 8, 128, 128, 1.0)
    most = [split_for(small, rows, 132).most for rows in (0, 1, 2, 4, 5, 8, 12, 16, 32, 256)]
    assert most == [16, 16, 8, 4, 6, 4, 2, 2, 1, 1]
    assert split_for(small, 8, 132).least == split_for(large, 1, 132).least == 8
    assert min(split_for(small, 12, 132).least, split_for(large, 8, 132).least) > 8
