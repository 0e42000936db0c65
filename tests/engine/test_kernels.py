"""The Triton kernels against float64, on fresh random inputs.

The bfloat16 products of Triton's interpreter are wrong, so bfloat16 is tested on a GPU only.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from penstock.engine.attention.base import LayerShape
from penstock.engine.noise import draw, id_steps, noise_keys
from penstock.engine.request import Sampler
from penstock.engine.scheduler import SchedulerConfig

from .attending import make_step
from .driver import request, run
from .interpreted import DEVICE, GPU, apart, assert_passes, here
from .multiplying import rms

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

SHAPES = {
    "64": LayerShape(4, 2, 64, 64, 0.125),
    "128": LayerShape(4, 1, 128, 128, 0.09),
    "256": LayerShape(2, 2, 256, 256, 0.06),
    "odd": LayerShape(6, 2, 20, 36, 0.2),
    "many heads share": LayerShape(40, 2, 16, 16, 0.25),
    "window": LayerShape(4, 2, 64, 64, 0.125, window=37),
    "soft-cap": LayerShape(4, 2, 64, 64, 0.125, softcap=2.0),
    "sinks": LayerShape(4, 2, 64, 64, 0.125, sinks=True),
    "all": LayerShape(8, 2, 80, 80, 0.1, softcap=3.0, window=90, sinks=True),
}


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_paged_attention_of_a_mixed_step_is_exact(name: str, dtype: torch.dtype) -> None:
    from penstock.engine.attention.triton import TritonAttention

    seed = int.from_bytes(os.urandom(4), "little")
    size = 32 if name == "64" else 16
    step = make_step(
        SHAPES[name],
        [0, 17, 530, 95],
        [(0, 1), (0, 20), (30, 37)],
        dtype=dtype,
        device=DEVICE,
        seed=seed,
        block_size=size,
        begun_as_zero=False,
    )
    out = step.run(TritonAttention(step.pool, [step.shape], *step.rows.table.shape))
    assert not out.isnan().any(), seed
    error = (out.double() - step.expected).abs().max().item()
    assert error < TOLERANCE[dtype], seed


@here
def test_decodes_alone_split_their_keys_and_merge_them_exactly() -> None:
    from penstock.engine.attention.triton import TritonAttention

    for positions in ([900], [1, 700, 1300]):
        step = make_step(SHAPES["sinks"], positions, [], device=DEVICE, seed=len(positions), begun_as_zero=False)
        backend = TritonAttention(step.pool, [step.shape], *step.rows.table.shape)
        backend.processors = 32
        torch.testing.assert_close(step.run(backend).double(), step.expected, atol=1e-5, rtol=1e-5)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 4096, 9001])
def test_the_fused_draw_gives_the_ids_of_the_plain_one(vocab_size: int, dtype: torch.dtype) -> None:
    from penstock.engine.kernels.sample import sample_rows

    rows = 10
    logits = (torch.randn(rows, vocab_size) * 3).to(dtype)
    logits[2, :] = 0
    logits[3, 5:] = float("-inf")
    temperature = torch.rand(rows) + 0.2
    # Noise that is nearly rounded away, or wholly; that is nearly all there is; and quotients beyond all numbers.
    temperature[[4, 5, 6, 7]] = torch.tensor([1e-5, 1e-12, 1e4, 1e-38])
    logits[7] *= 1e4
    keys = torch.from_numpy(noise_keys(np.arange(rows), np.arange(rows)))
    expected = draw(logits.float() / temperature[:, None], keys, id_steps(vocab_size, torch.device("cpu")))
    got = sample_rows(logits.to(DEVICE), temperature.to(DEVICE), keys.to(DEVICE))
    assert got.tolist() == expected.tolist()


@here
def test_what_is_computed_of_noise_first_is_near_enough_to_the_noise() -> None:
    from .noising import noise_about

    random = np.random.default_rng(0).integers(0, 2**64, 1024, np.uint64)
    ends = np.concatenate([np.uint64(2) ** np.arange(64, dtype=np.uint64), np.uint64(2**63) - random[:100] // np.uint64(2**20)])
    hashes = np.concatenate([random, ends, ~ends, random >> np.uint64(20), ~(random >> np.uint64(20)), random >> np.uint64(45)])
    hashes = np.resize(hashes, 4096)
    u = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    exact = -np.log(-np.log(u))
    out = noise_about(torch.from_numpy(hashes.view(np.int64)).to(DEVICE))
    assert np.abs(out.double().cpu().numpy() - exact).max() < 1e-4


@here
def test_a_row_that_excludes_everything_still_gives_an_id_of_the_vocabulary() -> None:
    from penstock.engine.kernels.sample import sample_rows

    logits = torch.full((2, 5000), float("-inf"), device=DEVICE)
    logits[1] = float("nan")
    ids = sample_rows(logits, torch.ones(2, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE))
    assert ((ids >= 0) & (ids < 5000)).all()


@here
def test_rows_that_draw_and_rows_that_do_not_are_sampled_together_and_remembered_by_slot() -> None:
    from penstock.engine.kernels.sample import sample_rows

    logits = torch.randn(5, 9001)
    logits[3, [70, 5000]] = 9.0  # of equal ones the lowest
    temperature = torch.tensor([0.0, 0.7, 0.0, 0.0, 1.3])
    keys = torch.from_numpy(noise_keys(np.arange(5), np.arange(5)))
    drawn = draw(logits / temperature.clamp(min=1e-9)[:, None], keys, id_steps(9001, torch.device("cpu")))
    expected = torch.where(temperature > 0, drawn, logits.argmax(1))
    expected[3] = 70
    last, slots = torch.full((8,), -1, device=DEVICE), torch.tensor([6, 0, 3, 7, 1], device=DEVICE)
    ids = sample_rows(logits.to(DEVICE), temperature.to(DEVICE), keys.to(DEVICE), last, slots)
    assert ids.tolist() == expected.tolist()
    assert last[slots].tolist() == expected.tolist()
    assert last[[2, 4, 5]].tolist() == [-1, -1, -1]


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("add", "after", "before"), [(1, 0, 1), (1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0)])
def test_a_sublayers_output_joins_the_stream(dtype: torch.dtype, add: int, after: int, before: int) -> None:
    from penstock.engine.kernels.residual import join_rows

    h, x = (torch.randn(5, 2 * 200).to(dtype)[:, :200] for _ in range(2))  # rows that do not lie together
    first, second = torch.randn(200).to(dtype), torch.randn(200)  # weights of the stream's dtype, and in float32
    sums = h.double() + (rms(x.double(), first.double()) if after else x.double()) if add else h.double()
    normed = rms(sums, second.double()) if before else sums
    given = [one.to(DEVICE) if there else None for one, there in ((x, add), (first, after), (second, before))]
    got = join_rows(h.to(DEVICE), *given, 1e-6)
    for one, expected in zip(got, (sums, normed), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double().cpu(), expected, atol=TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_the_gate_of_a_feed_forward(activation: str, dtype: torch.dtype) -> None:
    from penstock.engine.kernels.gate import gate_rows
    from penstock.engine.model.decoder import ACTIVATIONS

    x = (torch.randn(3, 2 * 1100) * 4).to(dtype)
    expected = ACTIVATIONS[activation](x.double()[:, :1100]) * x.double()[:, 1100:]
    torch.testing.assert_close(
        gate_rows(x.to(DEVICE), activation).double().cpu(), expected, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "pairs", "norm"), [(64, 32, True), (64, 32, False), (48, 12, True), (20, 10, False)])
@pytest.mark.parametrize("tokens", [3, 70])
def test_heads_are_normed_turned_and_written(tokens: int, dim: int, pairs: int, norm: bool, dtype: torch.dtype) -> None:
    from penstock.engine.kernels.heads import turn_heads

    heads, kv_heads, size = 4, 2, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    weights = torch.randn(heads + kv_heads, dim) if norm else None
    positions = torch.randint(0, 500, (tokens,))
    angles = torch.arange(500).double()[:, None] * 0.7 ** torch.arange(pairs)
    places = torch.randperm(8 * size)[:tokens]
    places[1] = -1
    keys, values = (torch.full((8, kv_heads, size, dim), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    kept = torch.full((tokens, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    q = turn_heads(
        qkv.to(DEVICE), None if weights is None else weights.to(DEVICE), 1e-6, angles.cos().float().to(DEVICE),
        angles.sin().float().to(DEVICE), positions.to(DEVICE), places.to(DEVICE), keys, values, kept=kept,
    )  # fmt: skip
    exact = qkv.double().view(tokens, -1, dim)
    turning = exact[:, : heads + kv_heads]
    if weights is not None:
        turning = rms(turning, weights.double())
    first, second, rest = turning.split((pairs, pairs, dim - 2 * pairs), -1)
    cos, sin = angles[positions].cos()[:, None], angles[positions].sin()[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
    near = {"atol": 4 * TOLERANCE[dtype], "rtol": 2 * TOLERANCE[dtype]}
    torch.testing.assert_close(q.double().cpu(), turned[:, :heads], **near)
    torch.testing.assert_close(kept.double().cpu(), turned[:, heads:], **near)
    for pool, expected in ((keys, turned[:, heads:]), (values, exact[:, heads + kv_heads :])):
        lines = pool.cpu().double().transpose(1, 2).reshape(-1, kv_heads, dim)
        written = places >= 0
        torch.testing.assert_close(lines[places[written]], expected[written], **near)
        assert int((~lines.isnan()).any(-1).any(-1).sum()) == tokens - 1


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "pairs", "norm", "window"), [(64, 32, True, None), (64, 32, False, 40), (48, 12, True, None), (20, 10, False, 1)]
)
@pytest.mark.parametrize("splitting", [False, True])
def test_decodes_from_a_fused_product_are_those_of_one_kernel_after_another(
    dim: int, pairs: int, norm: bool, window: int | None, splitting: bool, dtype: torch.dtype
) -> None:
    """Over a pool in which everything unwritten is NaN: what the launch writes to it is compared too. The last row is nobody's."""
    from penstock.engine.attention.base import LayerAttention
    from penstock.engine.attention.triton import TritonAttention

    heads, kv_heads = 4, 2
    shape = LayerShape(heads, kv_heads, dim, dim, 0.2, window=window)
    step = make_step(shape, [0, 15, 16, 200, 131], [], dtype=dtype, device=DEVICE, begun_as_zero=False)
    qkv = torch.randn(6, (heads + 2 * kv_heads) * dim).to(dtype).to(DEVICE)
    weights = torch.randn(heads + kv_heads, dim, device=DEVICE) if norm else None
    angles = torch.arange(300).double()[:, None] * 0.7 ** torch.arange(pairs)
    cos, sin = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    rows, positions = step.rows, step.rows.positions()
    columns = {"sources": rows.slots, "positions": positions, "places": rows.places(positions, 16)}
    sent = {name: torch.from_numpy(column.astype(np.int64)).to(DEVICE) for name, column in columns.items()}
    filled = {"sources": len(rows.table), "positions": 0, "places": -1}
    sent = {name: torch.cat((column, torch.full((1,), filled[name], device=DEVICE))) for name, column in sent.items()}
    sent["decodes"] = torch.tensor([5], device=DEVICE)
    keys, values = step.pool.layers[0]
    results = []
    for fused in (False, True):
        pool = [keys.clone(), values.clone()]
        backend = TritonAttention(step.pool, [shape], *rows.table.shape)
        backend.table[: len(rows.table)] = torch.from_numpy(rows.table).to(DEVICE)
        backend.processors = 32 if splitting else 1
        backend.begin_sized(sent, 6, 300)
        layer = LayerAttention(shape, *pool, backend)
        if fused:
            out = backend.attend_fused(layer, qkv, weights, 1e-6, cos, sin, sent["positions"])
        else:
            from penstock.engine.kernels.heads import turn_heads

            q = turn_heads(qkv, weights, 1e-6, cos, sin, sent["positions"], sent["places"], *pool)
            out = backend.attend_written(layer, q)
        assert not out[:5].isnan().any()
        results.append((out[:5].double(), *pool))
    assert backend.decodes is not None
    assert (backend.decodes.splits > 1) == splitting
    torch.testing.assert_close(results[1][0], results[0][0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.skipif(not GPU, reason="cuDNN is for GPUs")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 64)])
def test_a_long_prompt_attends_as_chunks_do(heads: int, kv_heads: int, dim: int) -> None:
    """In a step that is filled up with tokens of nobody, and over a pool that is NaN."""
    from penstock.engine.attention.base import KVPool, LayerAttention, StepRows
    from penstock.engine.attention.prompt import LONG
    from penstock.engine.attention.triton import TritonAttention

    shape, tokens, more = LayerShape(heads, kv_heads, dim, dim, dim**-0.5), LONG + 37, 50
    pool = KVPool([shape], tokens // 16 + 1, 16, torch.bfloat16, torch.device(DEVICE))
    backend = TritonAttention(pool, [shape], 1, pool.blocks)
    rows = StepRows(
        np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([tokens], np.int32), 0,
        np.random.default_rng(0).permutation(pool.blocks).astype(np.int32)[None], (np.zeros(pool.blocks, np.int32), np.arange(pool.blocks)),
    )  # fmt: skip
    positions = rows.positions()
    columns = backend.prepare(rows, positions, rows.places(positions, 16)) | {"sources": rows.slots, "positions": positions}
    assert backend.prompt
    filled = {"places": -1, "positions": 0}
    sent = {
        name: torch.from_numpy(np.append(column, [filled[name]] * more if name in filled else []).astype(np.int64)).to(DEVICE)
        for name, column in columns.items()
    }
    backend.write_table(sent)
    qkv = torch.randn(tokens + more, (heads + 2 * kv_heads) * dim, device=DEVICE).bfloat16()
    angles = torch.arange(tokens, device=DEVICE)[:, None] * 0.9 ** torch.arange(dim // 2, device=DEVICE)
    results = []
    for prompt in (False, True):
        pool.fill(float("nan"))
        backend.begin_sized(sent, 0, tokens, prompt=prompt)
        out = backend.attend_fused(
            LayerAttention(shape, *pool.layers[0], backend), qkv, None, 0.0, angles.cos(), angles.sin(), sent["positions"]
        )
        results.append((out[:tokens].double(), *(part.clone() for part in pool.layers[0])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[torch.bfloat16], rtol=TOLERANCE[torch.bfloat16], equal_nan=True)


@here
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_runner_with_the_kernels_gives_the_tokens_of_plain_torch(temperature: float) -> None:
    """Over many steps: block tables that change by deltas, chunks, decodes, slots with new occupants."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from penstock.engine.model.adopt import AdoptedModel
    from penstock.engine.runner import Runner, RunnerConfig

    config = AutoConfig.for_model(
        "mistral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61,
        initializer_range=0.4, max_position_embeddings=128, sliding_window=13,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AdoptedModel(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(DEVICE))
    requests = [
        request(i, [(3 * i + j) % 60 for j in range(n)], 12, Sampler(temperature=temperature, seed=i)) for i, n in enumerate((3, 30, 17, 1))
    ]
    got = []
    for attention in ("gather", "triton"):
        runner = Runner(model, RunnerConfig(slots=3, blocks=12, columns=8, attention=attention))
        runner.pool.fill(float("nan"))
        outcomes = run(runner, SchedulerConfig(slots=3, blocks=12, token_budget=19, max_model_len=128), [requests])
        got.append([outcome.ids for outcome in outcomes.values()])
    assert got[0] == got[1]
