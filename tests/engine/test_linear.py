"""The linear layer against float64, by whichever way a product of so many rows goes; and the compiled kernels' way into the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.model.linear import FEW, Linear, Packed, can_pack, find_panels

from .test_attention import compiled

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check(rows: int, inputs: int, outputs: int, *, bias: bool, gap: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    add = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, inputs + gap, generator=generator).to(dtype)[:, :inputs]
    expected = x.double() @ weight.double().t() + (0 if add is None else add.double())
    got = Linear(weight, add)(x)
    assert got.dtype == dtype
    scale = inputs**0.5
    torch.testing.assert_close(got.double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@given(
    rows=st.integers(1, FEW + 2), inputs=st.integers(1, 200), outputs=st.integers(1, 300), bias=st.booleans(), gap=st.sampled_from([0, 3]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_product_of_any_shape_is_exact(rows: int, inputs: int, outputs: int, bias: bool, gap: int, seed: int) -> None:
    check(rows, inputs, outputs, bias=bias, gap=gap, dtype=torch.float32, seed=seed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_every_dtype_is_exact(rows: int, dtype: torch.dtype) -> None:
    check(rows, 96, 130, bias=True, gap=0, dtype=dtype, seed=rows)


def packs_floats() -> bool:
    return can_pack(torch.zeros(64, 64))


@pytest.mark.skipif(not packs_floats(), reason="this build of torch has no packed product")
def test_the_layout_of_a_packed_weight_is_found_and_another_is_not_taken_for_it() -> None:
    weight = torch.randn(128, 96)
    packed = Packed(weight, None).weight
    if find_panels(weight, packed) is None:
        pytest.skip("this processor packs weights in another way")
    assert find_panels(weight + 1, packed) is None
    assert find_panels(weight.flip(0), packed) is None
    assert find_panels(weight.bfloat16(), packed) is None


def test_the_kernels_are_compiled_once_and_then_found(tmp_path: Path) -> None:
    compiled()
    program = "from penstock.engine.kernels.cpu import load_kernels; print(load_kernels() is not None)"

    def start() -> subprocess.Popen[str]:
        env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}
        return subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)

    for process in [start(), start()]:  # at once, as two engines may
        assert process.communicate()[0] == "True\n"
    (library,) = (tmp_path / "penstock").iterdir()
    made = library.stat().st_mtime_ns
    assert start().communicate()[0] == "True\n"
    assert library.stat().st_mtime_ns == made
    library.write_bytes(b"")  # damaged: it is made again
    assert start().communicate()[0] == "True\n"
    assert library.stat().st_size
    (tmp_path / "penstock").chmod(0o777)
    assert start().communicate()[0] == "False\n", "a library that anyone may have put there was loaded"


@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_what_does_not_fit_is_refused_in_either_way(rows: int) -> None:
    layer = Linear(torch.randn(64, 32), torch.randn(64))
    for wrong in (torch.randn(rows, 48), torch.randn(rows, 16), torch.randn(rows, 32).double(), torch.randn(rows, 32).bfloat16()):
        with pytest.raises(RuntimeError):
            layer(wrong)


def test_the_families_own_code_has_a_batch_of_one() -> None:
    weight, x = torch.randn(130, 96), torch.randn(1, 3, 96)
    torch.testing.assert_close(Linear(weight, None)(x), x @ weight.t(), atol=1e-4, rtol=1e-4)
    bias = torch.randn(260)[::2]
    torch.testing.assert_close(Linear(weight, bias)(x[0, :1]), x[0, :1] @ weight.t() + bias, atol=1e-4, rtol=1e-4)


def test_without_a_compiler_torch_does_the_work(tmp_path: Path) -> None:
    program = (
        "import torch; from penstock.engine.kernels.cpu import load_kernels; from penstock.engine.model.linear import Linear\n"
        "assert load_kernels() is None; w = torch.randn(64, 32); x = torch.randn(1, 32)\n"
        "torch.testing.assert_close(Linear(w, None)(x), x @ w.t())"
    )
    subprocess.run([sys.executable, "-c", program], env={"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}, check=True)
