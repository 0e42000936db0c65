"""Paged attention in torch against a naive float64 oracle, over a pool in which everything unwritten is NaN."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.attention.base import KVPool, LayerShape, block_bytes
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.attention.inplace import InPlaceAttention, suits
from penstock.engine.kernels.cpu import Kernels, open_kernels

from .attending import Step, make_step

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 4e-3}
KINDS = {
    "full": LayerShape(4, 2, 16, 16, 0.25),
    "own head each": LayerShape(4, 4, 16, 16, 0.3),
    "one for all": LayerShape(6, 1, 20, 20, 0.2),
    "values of another size": LayerShape(4, 2, 24, 16, 0.2),
    "window": LayerShape(4, 2, 16, 16, 0.25, window=11),
    "window of one": LayerShape(4, 2, 16, 16, 0.25, window=1),
    "soft-cap": LayerShape(4, 2, 16, 16, 0.25, softcap=2.0),
    "sinks": LayerShape(4, 2, 16, 16, 0.25, sinks=True),
    "all": LayerShape(8, 2, 32, 32, 0.4, softcap=3.0, window=20, sinks=True),
    "64 wide": LayerShape(4, 2, 64, 64, 0.125, sinks=True),
    "128 wide": LayerShape(3, 1, 128, 128, 0.09, window=50),
    "256 wide, shared by 16": LayerShape(32, 2, 256, 256, 0.06, softcap=30.0),
}
BACKENDS = ("gather", "inplace")
CPU = torch.device("cpu")


def compiled() -> Kernels:
    """The kernels; where there is a compiler, they must compile."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler")
    return open_kernels()


def close(step: Step, backend: str) -> None:
    if backend == "inplace" and not suits([step.shape], step.pool.block_size, step.q.dtype, CPU):
        backend = "gather"
    if backend == "inplace":
        out = step.run(InPlaceAttention(step.pool, [step.shape], compiled()))
    else:
        out = step.run(GatherAttention(step.pool, [step.shape]))
    assert not out.isnan().any()
    torch.testing.assert_close(out.double(), step.expected, atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_a_mixed_step_is_exact(backend: str, kind: str, block_size: int) -> None:
    step = make_step(
        KINDS[kind], sorted([0, 3, 15, 16, 31, 32, 100, 400]), [(0, 1), (0, 16), (0, 50), (16, 7), (33, 40)], block_size=block_size
    )
    close(step, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decodes_alone_and_prefills_alone_are_exact(backend: str) -> None:
    close(make_step(KINDS["full"], [70], []), backend)
    close(make_step(KINDS["full"], [], [(0, 33)]), backend)
    close(make_step(KINDS["full"], [], [(32, 1)]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [name for name, shape in KINDS.items() if shape.window is not None])
def test_a_window_begins_where_it_should(backend: str, kind: str) -> None:
    window = KINDS[kind].window or 0
    edges = {window + block + step for block in (0, 16, 32) for step in (-2, -1, 0, 1)}
    close(make_step(KINDS[kind], sorted(edge for edge in edges if edge >= 0), [(window, 20), (max(window - 3, 0), 5)]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "soft-cap"])
@pytest.mark.parametrize("scale", [1e15, 1e-30])
def test_scores_of_any_size_are_weighed(backend: str, kind: str, scale: float) -> None:
    """One key wins outright, or all are alike; and a row with a single key gives its value whatever its score."""
    close(make_step(replace(KINDS[kind], scaling=scale), [0, 3, 40], []), backend)


@given(
    decodes=st.lists(st.integers(0, 300), max_size=9),
    chunks=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 60)), max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    backend=st.sampled_from(sorted(BACKENDS)),
    ordered=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_step_is_exact(decodes: list[int], chunks: list[tuple[int, int]], kind: str, backend: str, ordered: bool, seed: int) -> None:
    if decodes or chunks:
        close(make_step(KINDS[kind], sorted(decodes) if ordered else decodes, chunks, seed=seed), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "window", "all"])
def test_gathering_works_in_half_precision(dtype: torch.dtype, kind: str) -> None:
    close(make_step(KINDS[kind], [5, 40, 90], [(0, 20), (20, 9)], dtype=dtype), "gather")


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_one_call_takes_are_exact(backend: str) -> None:
    close(make_step(KINDS["full"], sorted([*range(0, 600, 25), 1500, 2000]), []), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_former_occupant_left_in_a_block_cannot_spoil_it(backend: str) -> None:
    """A block that overflowed to infinity comes back to the pool and begins to fill again."""
    step = make_step(KINDS["full"], [32, 64], [(48, 3)])
    assert step.pool.stacks[0].isnan().any()
    step.pool.stacks[0][step.pool.stacks[0].isnan()] = float("inf")
    close(step, backend)


def test_reading_in_place_is_for_what_the_kernel_can_do() -> None:
    plain = LayerShape(32, 2, 64, 64, 1.0, softcap=1.0, window=3, sinks=True)
    assert suits([plain], 16, torch.float32, CPU)
    assert not suits([plain], 16, torch.bfloat16, CPU)
    assert not suits([plain], 64, torch.float32, CPU)
    for heads, dim, value_dim in ((34, 64, 64), (3, 64, 64), (2, 64, 32), (2, 20, 20), (2, 512, 512)):
        other = LayerShape(heads, 2, dim, value_dim, 1.0)
        assert not suits([plain, other], 16, torch.float32, CPU)
        with pytest.raises(ValueError, match="cannot do"):
            InPlaceAttention(KVPool([other], 2, 16, torch.float32, CPU), [other], compiled())


def test_layers_of_different_shapes_share_a_pool() -> None:
    layers = [LayerShape(4, 2, 16, 16, 1.0), LayerShape(4, 4, 8, 8, 1.0), LayerShape(4, 2, 16, 24, 1.0)]
    pool = KVPool(layers, 5, 16, torch.float32, torch.device("cpu"))
    shapes = [tuple(part.shape) for pair in pool.layers for part in pair]
    assert shapes == [(5, 2, 16, 16), (5, 2, 16, 16), (5, 4, 16, 8), (5, 4, 16, 8), (5, 2, 16, 16), (5, 2, 16, 24)]
    pointers = {part.data_ptr() for pair in pool.layers for part in pair}
    assert len(pointers) == 6
    assert sum(stack.nbytes for stack in pool.stacks) == 5 * block_bytes(layers, 16, torch.float32)
