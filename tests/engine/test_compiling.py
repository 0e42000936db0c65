"""The Triton kernels compile for a Hopper GPU, in bfloat16, which needs none: the interpreter takes what the compiler refuses.

What this reaches are the kernels of attention and of the decoder, through the functions that launch them; nothing is run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine.attention.base import KVPool, LayerAttention, LayerShape
from penstock.engine.attention.storage import FP8

MEANT = os.environ.get("PENSTOCK_TEST_COMPILING") == "1"
elsewhere = pytest.mark.skipif(MEANT, reason="the kernels compile in this process")
here = pytest.mark.skipif(not MEANT, reason="compiles in a process of its own, whose driver is a stand-in")
SHAPES = {
    "qwen3": LayerShape(16, 8, 128, 128, 0.09),
    "all": LayerShape(8, 2, 80, 96, 0.1, softcap=3.0, window=90, sinks=True),
    "256": LayerShape(8, 4, 256, 256, 0.06, window=512),
}


@elsewhere
def test_all_of_this_file_passes_with_a_driver_that_is_a_stand_in() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"PENSTOCK_TEST_COMPILING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


class Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches only compile; the names of the kernels that did."""
    names: list[str] = []
    if MEANT:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        from penstock.engine.attention import triton as attention
        from penstock.engine.kernels import decode_attention, expand, gate, heads, paged_attention, residual, sample, shrink

        run = JITFunction.run

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            assert "sm_90" in kernel.asm["ptx"]
            assert self.__name__ != "_attend_tile" or "cp.async" in kernel.asm["ptx"], "keys are not loaded ahead"
            if self.__name__ in ("_shrink", "_expand"):
                check_adapters(kernel, options)
            names.append(self.__name__)
            return kernel

        monkeypatch.setattr(JITFunction, "run", compile_only)
        driver.set_active(Driver())
        for module in (decode_attention, expand, gate, heads, paged_attention, residual, sample, shrink):
            monkeypatch.setattr(module, "overlap", lambda x, **_: {"OVERLAP": True, "launch_pdl": True}, raising=False)
        assert attention.TritonAttention.fuses
    return names


@here
@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
def test_attention_of_decodes_and_chunks(name: str, splitting: bool, kv_dtype: torch.dtype, compiled: list[str]) -> None:
    from penstock.engine.attention.triton import TritonAttention

    shape, dtype = SHAPES[name], torch.bfloat16
    pool = KVPool([shape], 4, 16, kv_dtype, torch.device("cpu"))
    backend = TritonAttention(pool, [shape], 2, 64, dtype=dtype)
    backend.processors = 132 if splitting else 1
    column: Callable[[int], Tensor] = lambda n: torch.zeros(n, dtype=torch.int64)  # noqa: E731
    columns = {"sources": column(8), "positions": column(8), "places": column(8), "decodes": column(1)}
    layer = LayerAttention(shape, *pool.layers[0], backend)
    sinks = torch.zeros(shape.heads, dtype=dtype) if shape.sinks else None
    q = torch.zeros(8, shape.heads, shape.head_dim, dtype=dtype)
    k, v = (torch.zeros(8, shape.kv_heads, dim, dtype=dtype) for dim in (shape.head_dim, shape.value_dim))
    backend.begin_sized(columns, 2, 900)
    backend.attend(layer, q, k, v, sinks)
    assert set(compiled) == {"_write_rows", "_decode"}
    angles = torch.zeros(1000, shape.head_dim // 2)
    if shape.head_dim == shape.value_dim and sinks is None:
        qkv = torch.zeros(8, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, dtype=dtype)
        for weights in (None, torch.zeros(shape.heads + shape.kv_heads, shape.head_dim, dtype=dtype)):
            backend.attend_fused(layer, qkv, weights, 1e-6, angles, angles, column(8))
    for queries in backend.tiles:
        columns |= {f"tile.{part}.{queries}": column(4) for part in ("slots", "starts", "firsts", "counts")}
    backend.begin_sized(columns, 2, 900)
    backend.attend(layer, q, k, v, sinks)
    assert "_attend_tile" in compiled
    if shape.head_dim == shape.value_dim and sinks is None:
        backend.attend_fused(layer, qkv, None, 1e-6, angles, angles, column(8))
        assert "_turn" in compiled


@here
def test_what_stands_between_products(compiled: list[str]) -> None:
    from penstock.engine.kernels.gate import ACTIVATIONS, gate_rows
    from penstock.engine.kernels.residual import join_rows
    from penstock.engine.kernels.sample import sample_rows

    h, weight = torch.zeros(4, 1024, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.bfloat16)
    for after, before in ((None, weight), (weight.float(), weight), (weight, None)):
        join_rows(h, h, after, before, 1e-6)
    for activation in ACTIVATIONS:
        gate_rows(h, activation)
    slots = torch.zeros(4, dtype=torch.int64)
    sample_rows(h, torch.zeros(4), slots, torch.from_numpy(np.zeros(9, np.int64)), slots)
    assert set(compiled) == {"_join", "_gate", "_about_highest", "_choose"}


def usage(kernel: Any) -> tuple[int, int]:
    """How many registers a thread of a compiled kernel has, and how many bytes of stack."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", used)[0]) for name in ("REG", "STACK"))
    return registers, stack


def check_adapters(kernel: Any, options: Mapping[str, Any]) -> None:
    """As many programs as are launched stay on a multiprocessor at once, hardly anything is spilled (it differs from one version of Triton
    to the next), and weights are loaded wide and ahead."""
    from penstock.engine.kernels import expand, shrink

    rows, threads = options["ROWS"], 32 * kernel.metadata.num_warps
    programs = shrink.programs_of(rows) if kernel.metadata.name == "_shrink" else expand.programs_of(rows, options["TOGETHER"])
    registers, stack = usage(kernel)
    print(kernel.metadata.name, options["ROWS"], options.get("TOGETHER"), options.get("MORE"), registers, stack, kernel.metadata.shared)
    if not options.get("MORE", False):
        assert stack <= 32
        assert -(-registers // 8) * 8 * threads * programs <= 65536
        assert (kernel.metadata.shared + 1024) * programs <= 228 * 1024
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]


@here
@pytest.mark.parametrize(("rows", "pages"), [(16, 1), (16, 4), (16, 6), (64, 1), (64, 4), (64, 6)])
@pytest.mark.parametrize("sizes", [(4096, 4096, 1024, 14336), (1024, 2048, 1024, 3072)], ids=["8B", "0.6B"])
def test_adapters_of_any_rank(sizes: tuple[int, int, int, int], rows: int, pages: int, compiled: list[str]) -> None:
    from penstock.engine.kernels.tiles import Cut
    from penstock.engine.lora.layout import PagePool, Site, layout_of
    from penstock.engine.lora.triton import TritonAdapters

    hidden, q, kv, inner = sizes
    layout = layout_of(
        [
            (Site("q", hidden, q), Site("k", hidden, kv), Site("v", hidden, kv)), (Site("o", q, hidden),),
            (Site("gate", hidden, inner), Site("up", hidden, inner)), (Site("down", inner, hidden),),
        ]
    )  # fmt: skip
    backend, cut = TritonAdapters(PagePool(layout, 1, torch.bfloat16, torch.device("cpu"))), Cut(8, rows, 4, 4 * pages, pages)
    columns = {name: torch.zeros(length, dtype=torch.int64) for name, (length, _) in backend.lengths(cut, None).items()}
    backend.begin_sized(columns, cut, None)
    for place in layout.places[:: 1 if pages == 1 else 3]:  # the others are no harder
        x, y = (torch.zeros(8, width, dtype=torch.bfloat16) for width in (place.in_features, sum(place.outs)))
        backend.add(place, x, y)
    assert set(compiled) == {"_shrink", "_expand"}
