"""Attention of prefill chunks on Hopper's tensor cores, against float64: on a GPU that has them, else emulated."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from penstock.engine.attention.base import LayerShape
from penstock.engine.attention.triton import TILE
from penstock.engine.kernels import chunk_attention
from penstock.engine.kernels.chunk_attention import attend_tiles, suits_chunks
from penstock.engine.kernels.cuda import HOPPER
from penstock.engine.kernels.paged_attention import Chunks, queries_in_tile

from .attending import make_step
from .emulating import emulated_boxes, emulated_chunks
from .interpreted import DEVICE, GPU

pytestmark = pytest.mark.skipif(not GPU and shutil.which("g++") is None, reason="neither a GPU nor a compiler of C++")
TOLERANCE = 2e-2
DIM = 128
NOBODYS = 2  # tiles that fill up a graph


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(chunk_attention, "_kernel", emulated_chunks)
        monkeypatch.setattr(chunk_attention, "map_boxes", emulated_boxes)
        monkeypatch.setattr(chunk_attention, "processors_of", lambda _: 3)
    elif torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("the device has other tensor cores")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window"), [(8, 2, 16, None), (4, 4, 32, None), (14, 2, 16, 150), (2, 1, 16, 7)]
)
def test_chunks_attend_to_all_that_they_may_see(heads: int, kv_heads: int, size: int, window: int | None) -> None:
    """Over a pool that is NaN where nothing was written."""
    shape = LayerShape(heads, kv_heads, DIM, DIM, DIM**-0.5, window=window)
    chunks = [(0, 300), (130, 70), (0, 1), (255, 1), (0, 16), (2000 if GPU else 200, 61)]
    step = make_step(shape, [], chunks, block_size=size, dtype=torch.bfloat16, begun_as_zero=False, seed=heads)
    rows, positions = step.rows, step.rows.positions()
    keys, values = (part.to(DEVICE, copy=True) for part in step.pool.layers[0])
    places = torch.from_numpy(rows.places(positions, size).astype(np.int64)).to(DEVICE)
    for pool, new in ((keys, step.k), (values, step.v)):
        pool[places // size, :, places % size] = new.to(DEVICE)
    queries = queries_in_tile(heads // kv_heads, DIM, torch.bfloat16)
    tiles = -(-rows.counts // queries)
    row = np.repeat(np.arange(len(rows.slots)), tiles)
    offsets = np.concatenate([np.arange(count) for count in tiles]) * queries
    columns = {
        "slots": rows.slots[row], "starts": rows.starts[row] + offsets, "firsts": rows.firsts[row] + offsets,
        "counts": np.minimum(rows.counts[row] - offsets, queries),
    }  # fmt: skip
    sent = [torch.from_numpy(np.append(columns[name], [0] * NOBODYS).astype(np.int64)).to(DEVICE) for name in TILE]
    q = step.q.to(DEVICE)
    out = torch.full_like(q, float("nan"))
    assert not GPU or suits_chunks(shape, q, keys)
    attend_tiles(q, keys, values, out, Chunks(*sent, torch.from_numpy(rows.table).to(DEVICE)), shape)
    torch.testing.assert_close(out.double().cpu(), step.expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.skipif(not GPU, reason="what suits the kernel is on a GPU")
def test_what_suits_the_kernel() -> None:
    def suits(shape: LayerShape, dtype: torch.dtype = torch.bfloat16, size: int = 16) -> bool:
        x = torch.zeros(1, shape.heads, shape.head_dim, dtype=dtype, device=DEVICE)
        return suits_chunks(shape, x, torch.zeros(1, shape.kv_heads, size, shape.head_dim, dtype=dtype, device=DEVICE))

    assert suits(LayerShape(16, 8, DIM, DIM, 1.0, window=9), size=32)
    assert not suits(LayerShape(16, 8, DIM, DIM, 1.0), dtype=torch.float16)
    assert not suits(LayerShape(16, 8, DIM, DIM, 1.0), size=8)
    assert not suits(LayerShape(16, 8, 64, 64, 1.0))
    assert not suits(LayerShape(16, 8, DIM, DIM, 1.0, softcap=30.0))
    assert not suits(LayerShape(16, 8, DIM, DIM, 1.0, sinks=True))
