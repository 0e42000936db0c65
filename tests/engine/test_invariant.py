"""What a deterministic model is made of: a row, or a token, has the same bits whatever else is there."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine.attention.base import AttentionBackend, KVPool, LayerAttention, LayerShape, StepRows
from penstock.engine.attention.inplace import TokenAttention
from penstock.engine.model.invariant import ACTIVATIONS, Panels
from penstock.engine.model.linear import Linear
from penstock.engine.staging import HostStaging

from .interpreted import DEVICE, GPU, apart, assert_passes, elsewhere, here
from .test_attention import compiled

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")
SHAPES = {
    "64": LayerShape(4, 2, 64, 64, 0.125),
    "128": LayerShape(4, 1, 128, 128, 0.09),
    "many heads share": LayerShape(16, 2, 16, 16, 0.25),
    "soft-cap and sinks": LayerShape(4, 2, 64, 64, 0.125, softcap=2.0, sinks=True),
}
WINDOWS = {
    "window": LayerShape(4, 2, 64, 64, 0.125, window=37),
    "all": LayerShape(8, 2, 80, 80, 0.1, softcap=3.0, window=50, sinks=True),
}


@apart
def test_all_of_this_file_that_needs_triton_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


def assert_rows_are_their_own(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Any of the rows of x, in any number and at any place, give what they give all together."""
    whole = run(x)
    generator = torch.Generator().manual_seed(len(x))
    for count in (1, 2, 3, 4, 5, 7, 8, 16, 17, 63, 64, 65, 129):
        chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
        got = run(x.index_select(0, chosen))
        assert torch.equal(got, whole.index_select(0, chosen)), count


# ── products ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

MATRICES = [(130, 96), (64, 200), (77, 33), (200, 640)]  # `[out, in]`


@elsewhere
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outer", "inner"), MATRICES)
def test_a_product_on_a_cpu_gives_a_row_its_bits_alone(outer: int, inner: int, bias: bool) -> None:
    compiled()
    weight, add, x = torch.randn(outer, inner), torch.randn(outer) if bias else None, torch.randn(150, inner + 3)[:, :inner]
    layer = Linear(weight, add, deterministic=True)
    assert isinstance(layer.method, Panels)
    expected = x.double() @ weight.double().t() + (0.0 if add is None else add.double())
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5 * inner, rtol=1e-5)
    assert torch.equal(layer(x[None]), layer(x)[None])
    assert_rows_are_their_own(layer, x)
    with pytest.raises(RuntimeError, match="does not multiply"):
        layer(x[:, 1:])
    with pytest.raises(RuntimeError, match="does not multiply"):
        layer(x.double())


@here
@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outer", "inner"), [*MATRICES, *([(9000, 1024)] if GPU else [])])
def test_a_product_with_the_kernel_gives_a_row_its_bits_alone(outer: int, inner: int, bias: bool, dtype: torch.dtype) -> None:
    from penstock.engine.kernels.product import multiply_rows

    weight, x = (torch.randn(outer, inner) / inner**0.5).to(dtype).to(DEVICE), torch.randn(150, inner + 8).to(dtype).to(DEVICE)[:, :inner]
    add = torch.randn(outer).to(dtype).to(DEVICE) if bias else None
    expected = x.double() @ weight.double().t() + (0.0 if add is None else add.double())
    torch.testing.assert_close(multiply_rows(x, weight, add).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_rows_are_their_own(lambda some: multiply_rows(some, weight, add), x)
    assert multiply_rows(x[:0], weight, add).shape == (0, outer)


# ── what stands between them ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", [17, 96, 1000])
def test_an_activation_made_of_plain_operations(name: str, width: int) -> None:
    from penstock.engine.model.decoder import ACTIVATIONS as USUAL

    x = torch.randn(150, 2 * width) * 3
    run = ACTIVATIONS[name]
    torch.testing.assert_close(run(x), USUAL[name](x), atol=1e-5, rtol=1e-5)
    assert_rows_are_their_own(lambda some: run(some[:, :width]) * some[:, width:], x)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_gates_with_the_kernels(dtype: torch.dtype) -> None:
    from penstock.engine.kernels.gate import gate_rows
    from penstock.engine.kernels.residual import join_rows

    x, weight = torch.randn(150, 2 * 200).to(dtype).to(DEVICE), torch.randn(200).to(dtype).to(DEVICE)
    assert_rows_are_their_own(lambda some: torch.cat(join_rows(some[:, :200], some[:, 200:], weight, weight, 1e-6), 1), x)
    assert_rows_are_their_own(lambda some: gate_rows(some, "silu"), x)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_norms_of_heads_with_the_kernel(dim: int, dtype: torch.dtype) -> None:
    from penstock.engine.kernels.heads import turn_heads

    heads, kv_heads = 4, 2
    x, weights = torch.randn(150, (heads + 2 * kv_heads) * dim).to(dtype).to(DEVICE), torch.randn(heads + kv_heads, dim, device=DEVICE)
    cos, sin = (part.to(DEVICE) for part in (torch.rand(500, dim // 2), torch.rand(500, dim // 2)))

    def run(some: Tensor) -> Tensor:
        """A token's position is in its last number."""
        positions = (some[:, -1].float().abs() * 100).long()
        keys, values = (torch.zeros(10, kv_heads, 16, dim, dtype=dtype, device=DEVICE) for _ in range(2))
        places = torch.arange(len(some), device=DEVICE)
        q = turn_heads(some, weights, 1e-6, cos, sin, positions, places, keys, values, alike=True)
        return torch.cat((q.flatten(1), *(pool.transpose(1, 2).reshape(160, -1)[: len(some)] for pool in (keys, values))), 1)

    assert_rows_are_their_own(run, x)


# ── attention ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


Make = Callable[[KVPool, int, int], AttentionBackend]  # of a pool, slots, and columns of the block table


def attended(shape: LayerShape, cuts: list[int], dtype: torch.dtype, neighbours: int, make: Make) -> Tensor:
    """One sequence's attention `[tokens, heads, dim]`, computed in chunks that end at `cuts`; one of a single token is a decode. In each
    step there are rows of other sequences, too, in other places each time."""
    generator, draw = torch.Generator().manual_seed(1), random.Random(len(cuts))
    length, size = cuts[-1], 16
    columns = -(-length // size)
    q, k, v = (
        torch.randn(length, heads, shape.head_dim, generator=generator).to(dtype).to(DEVICE)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    sinks = torch.randn(shape.heads, generator=generator).to(dtype).to(DEVICE) if shape.sinks else None
    pool = KVPool([shape], (neighbours + 1) * columns, size, dtype, DEVICE)
    pool.fill(float("nan"))
    backend = make(pool, neighbours + 1, columns)
    layer = LayerAttention(shape, *pool.layers[0], backend)
    blocks = list(range(pool.blocks))
    draw.shuffle(blocks)
    table = np.array(blocks, np.int32).reshape(neighbours + 1, columns)
    every = np.indices(table.shape).reshape(2, -1).astype(np.int32)
    out, start = [], 0
    for end in cuts:
        decodes = [(slot, 1) for slot in range(1, neighbours) if draw.random() < 0.6]
        chunks = [(slot, draw.randrange(2, 40)) for slot in range(1, neighbours + 1) if slot not in dict(decodes)]
        mine = decodes if end - start == 1 else chunks
        mine.insert(draw.randrange(len(mine) + 1), (0, end - start))
        slots, counts = np.array(decodes + chunks, np.int32).T
        at = slots.tolist().index(0)
        rows = StepRows(slots, np.where(slots == 0, np.int32(start), np.int32(0)), counts, len(decodes), table, (every[0], every[1]))
        positions = rows.positions()
        sent = backend.prepare(rows, positions, rows.places(positions, size)) | {"sources": rows.slots, "positions": positions}
        backend.begin({name: column.to(DEVICE) for name, column in HostStaging().send(sent).items()})
        first, total = int(rows.firsts[at]), int(rows.firsts[-1])
        given = [torch.randn(total, *part.shape[1:]).to(dtype).to(DEVICE) for part in (q, k, v)]
        for new, part in zip(given, (q, k, v), strict=True):
            new[first : first + end - start] = part[start:end]
        out.append(backend.attend(layer, *given, sinks)[first : first + end - start])
        start = end
    return torch.cat(out)


def assert_chunks_do_not_matter(shape: LayerShape, dtype: torch.dtype, make: Make) -> None:
    length = 300 if GPU else 110
    whole = attended(shape, [length], dtype, 0, make)
    assert not whole.isnan().any()
    draw = random.Random(3)
    for ends in (range(1, 1), range(93, 103), range(33, length, 33), draw.sample(range(1, length), 7)):
        assert torch.equal(attended(shape, [*sorted(ends), length], dtype, 3, make), whole), list(ends)


@elsewhere
@pytest.mark.parametrize("name", SHAPES | WINDOWS)
def test_attention_on_a_cpu_gives_a_token_its_bits_in_any_chunk(name: str) -> None:
    shape = (SHAPES | WINDOWS)[name]
    assert_chunks_do_not_matter(shape, torch.float32, lambda pool, *_: TokenAttention(pool, [shape], compiled()))


@here
@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*SHAPES, *WINDOWS])
def test_attention_with_the_kernel_gives_a_token_its_bits_in_any_chunk(name: str, dtype: torch.dtype) -> None:
    from penstock.engine.attention.triton import TritonAttention

    shape = (SHAPES | WINDOWS)[name]
    assert_chunks_do_not_matter(shape, dtype, lambda *sizes: TritonAttention(sizes[0], [shape], *sizes[1:], deterministic=True))
