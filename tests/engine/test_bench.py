"""What `penstock bench kernels` times does what it says. How long it takes is nobody's promise."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.clients.bench.shapes import write_model
from penstock.engine.bench import case as cases_of
from penstock.engine.bench.__main__ import cases, measure, timed
from penstock.engine.bench.adapters import ADAPTERS, begin, groups, time_adapters
from penstock.engine.bench.between import time_between
from penstock.engine.bench.case import Case, Subject, read_subject
from penstock.engine.bench.ceilings import Ceilings
from penstock.engine.bench.experts import time_experts
from penstock.engine.bench.products import time_products
from penstock.engine.lora.layout import RANKS, PagePool, layout_of
from penstock.engine.model.load import read_config
from penstock.engine.model.spec import read_spec

from .interpreted import DEVICE, GPU, READY, apart, assert_passes, elsewhere, here

PRODUCTS = {"qkv", "out", "gate up", "down"}
ADAPTED = {f"{name} {what}" for name in PRODUCTS for what in ("adapters", "adapted")}
ON_BOTH = PRODUCTS | ADAPTED | {"norm join", "heads", "gate", "decode attention", "head", "sampling", "prefill attention"}
ADAPTED_FEW = {f"{name} adapted, few rows" for name in PRODUCTS}
FEW = {f"{name}, few rows" for name in PRODUCTS}
EXPERTS = {"router", "routing", "experts"}
MLP = {"gate", "gate up", "down", "gate up adapters", "gate up adapted", "down adapters", "down adapted"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model("cpu-1m", tmp_path)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made for the time that a call takes, which is not looked at here."""
    monkeypatch.setattr(cases_of, "MOST_COPIES", 2)


def with_experts(folder: Path, **more: Any) -> Path:
    """cpu-1m with 16 experts of width 64 in the place of each feed-forward, 4 of them for a token."""
    file = folder / "config.json"
    facts = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 32, "norm_topk_prob": True}
    facts |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []}
    file.write_text(json.dumps(json.loads(file.read_text()) | facts | more))
    return folder


def subject_of(folder: Path, *, fused: bool) -> Subject:
    spec = read_spec(str(folder), weights="random", max_model_len=64)
    dtype = torch.bfloat16 if GPU else torch.float16 if fused else torch.float32  # the interpreter's bfloat16 products are wrong
    return read_subject(read_config(spec), 64, dtype, DEVICE, fused=fused)


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


@here
def test_every_triton_kernel_is_called_as_the_engine_calls_it(folder: Path) -> None:
    from penstock.engine.bench.attention import time_prompts

    subject = subject_of(folder, fused=True)
    found = list(chain(cases(subject, [1, 3], 40), time_prompts(subject, 2, 24)))
    # Products of few rows are in CUDA C++, which no interpreter runs.
    assert {case.kernel for case in found} == ON_BOTH | (FEW | ADAPTED_FEW if GPU else set())
    assert {case.rows for case in found if case.kernel in FEW} == ({1, 3} if GPU else set())
    for case in found:
        check_calls(case)


def check_calls(case: Case) -> None:
    for call in case.calls:
        out = call()
        assert out.isfinite().all(), case.kernel
        assert len(out) == case.rows, case.kernel


@here
def test_those_of_experts_and_of_several_adapters_are_called_so_too(folder: Path) -> None:
    subject = subject_of(with_experts(folder), fused=True)
    found = [*time_experts(subject, 3), *time_adapters(subject, 20, 9)]
    assert [case.shape for case in found if case.kernel == "out adapters"] == ["128 to 128, 1 adapter", "128 to 128, 8 adapters"]
    for case in found:
        check_calls(case)


@elsewhere
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_on_a_cpu_there_is_a_row_for_each_kernel_and_size(folder: Path, kv_dtype: str) -> None:
    figures = measure(str(folder), [1, 3], 40, device="cpu", kv_dtype=kv_dtype)
    assert {row["kernel"] for row in figures["rows"]} == ON_BOTH
    assert len(figures["rows"]) == 2 * (len(ON_BOTH) - 1) + 1
    assert min(figures["ceilings"][name] for name in ("tb_per_s", "tflop_per_s", "empty_us")) > 0
    for row in figures["rows"]:
        assert row["us"] > 0
        assert row["of_floor"] == pytest.approx(row["floor_us"] / row["us"])
        assert row["tb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e6)


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    ceilings = Ceilings(read=1e12, copy=5e11, multiply=1e14, empty=1e-6)
    moving = Case("a", "", 1, bytes=4_000_000, flops=100, calls=())
    computing = Case("b", "", 1, bytes=100, flops=800_000_000, calls=())
    assert timed(moving, 8e-6, ceilings)["floor_us"] == pytest.approx(4)
    assert timed(moving, 8e-6, ceilings)["of_floor"] == pytest.approx(0.5)
    assert timed(computing, 16e-6, ceilings)["floor_us"] == pytest.approx(8)
    assert timed(computing, 16e-6, ceilings)["tflop_per_s"] == pytest.approx(50)


def test_what_a_kernel_must_do_is_counted(folder: Path) -> None:
    """cpu-1m: hidden 128, 256 within, 4 heads and 2 KV heads of 32."""
    subject = subject_of(folder, fused=False)
    if GPU:
        pytest.skip("the figures are those of float32")
    of = {case.kernel: case for case in cases(subject, [2], 40)}
    assert of["down"].flops == 2 * 2 * 256 * 128
    assert of["down"].bytes == 4 * (256 * 128 + 2 * (256 + 128))
    assert of["decode attention"].flops == 2 * 2 * 40 * 4 * (32 + 32)
    assert of["decode attention"].bytes == 4 * (2 * 40 * 2 * (32 + 32) + 2 * 4 * (32 + 32))
    assert of["sampling"].bytes == 4 * 2 * 2048


@elsewhere
def test_experts_take_the_place_of_a_feed_forward(folder: Path) -> None:
    figures = measure(str(with_experts(folder)), [1, 9], 40, device="cpu")
    assert {row["kernel"] for row in figures["rows"]} == (ON_BOTH | EXPERTS) - MLP
    assert min(row["us"] for row in figures["rows"]) > 0


def test_where_some_layers_have_no_experts_both_are_timed(folder: Path) -> None:
    subject = subject_of(with_experts(folder, mlp_only_layers=[0]), fused=READY)
    found = {case.kernel: case for case in chain(time_between(subject, 2), time_products(subject, 2), time_experts(subject, 2))}
    assert found.keys() >= {"gate", "gate up", "down"} | EXPERTS
    assert found["down"].shape == "256 to 128"
    assert found["experts"].shape.startswith("128 to 64, ")


@pytest.mark.parametrize("rows", [1, 40])
def test_experts_are_read_once_if_some_token_has_them(folder: Path, rows: int) -> None:
    subject = subject_of(with_experts(folder), fused=READY)
    of, item = {case.kernel: case for case in time_experts(subject, rows)}, subject.dtype.itemsize
    touched = int(of["experts"].shape.split(", ")[1].split()[0])
    assert touched == 4 if rows == 1 else 4 < touched <= 16
    assert of["experts"].bytes == item * (touched * 3 * 64 * 128 + rows * (16 + 2 * 128))
    assert of["experts"].flops == 2 * rows * 4 * 3 * 64 * 128
    assert of["router"].bytes == item * (16 * 128 + rows * (128 + 16))
    assert of["routing"].bytes == item * rows * 16 + rows * 4 * (8 if READY else 4 + 8)
    assert len({tuple(call()[0].tolist()) for call in of["experts"].calls}) == len(of["experts"].calls) > 1


def test_adapters_are_of_as_many_as_there_are_tokens_for(folder: Path) -> None:
    subject = subject_of(folder, fused=READY)
    item = subject.dtype.itemsize
    found = list(time_adapters(subject, 33, 33))
    assert [case.shape for case in found if case.kernel == "qkv adapters"] == [
        f"128 to 256, {name}" for name in ("1 adapter", "8 adapters", "32 adapters")
    ]
    assert {case.kernel for case in found} == ADAPTED
    assert ADAPTERS[-1] > 33
    assert {case.shape for case in time_adapters(subject, 33, 7)} == {case.shape for case in found if "1 adapter" in case.shape}
    of = {(case.kernel, case.shape): case for case in found}
    alone, both = of["qkv adapters", "128 to 256, 8 adapters"], of["qkv adapted", "128 to 256, 8 adapters"]
    pages = 8 * 16 * (3 * 128 + 256)
    assert alone.bytes == item * (pages + 33 * (128 + 2 * 256))
    assert alone.flops == 2 * 33 * 16 * (3 * 128 + 256)
    assert both.bytes == item * (128 * 256 + pages + 33 * (128 + 256))
    assert both.flops == alone.flops + 2 * 33 * 128 * 256
    first, second = both.calls
    assert not torch.equal(first(), second())


def test_tokens_have_the_adapters_of_a_step_in_turn(folder: Path) -> None:
    subject = subject_of(folder, fused=READY)
    group = groups(subject)["gate up"]
    assert [(site.in_features, site.out_features) for site in group] == [(128, 256)] * 2
    pool = PagePool(layout_of([group]), 3, subject.dtype, DEVICE)
    pool.data.normal_(0.0, 0.1)
    pool.used.fill_(RANKS)
    backend, place = begin(subject, pool, 7, 5), pool.layout.places[0]
    x, y = subject.draw(7, 128), subject.draw(7, 512)
    got = y.clone()
    backend.add(place, x, got)
    for token in range(7):
        added = [x[token].double() @ a.double().t() @ b.double() for a, b in pool.matrices(place, token % 3)]
        tolerance = 1e-5 if subject.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got[token].double(), y[token].double() + torch.cat(added), atol=tolerance, rtol=tolerance)
