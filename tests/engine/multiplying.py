"""Products with what surrounds them in one launch, against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine.model.decoder import ACTIVATIONS
from penstock.engine.model.norm import Norm

from .interpreted import DEVICE

AROUND = [(0, 0, None), (1, 0, None), (0, 1, None), (1, 0, "silu"), (2, 0, "gelu"), (2, 0, "gelu_pytorch_tanh")]  # norm, add, activation


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def check_product(
    multiply: Callable[..., Tensor], rows: int, inner: int, outer: int, dtype: torch.dtype, tolerance: float, *, bias: bool, norm: int,
    add: int, activation: str | None,
) -> None:  # fmt: skip
    """`norm`: 0 none, 1 with a weight of `dtype`, 2 of float32. The rows of x lie apart."""
    x, weight = torch.randn(rows, 2 * inner).to(dtype).to(DEVICE)[:, :inner], (torch.randn(outer, inner) / inner**0.5).to(dtype)
    offset, stream = torch.randn(outer).to(dtype), torch.randn(rows, outer).to(dtype)
    scale = torch.randn(inner) if norm == 2 else torch.randn(inner).to(dtype)
    exact = x.double().cpu()
    expected = (rms(exact, scale.double()) if norm else exact) @ weight.double().t()
    expected += offset.double() if bias else 0.0
    expected += stream.double() if add else 0.0
    if activation is not None:
        half = outer // 2
        expected = ACTIVATIONS[activation](expected[:, :half]) * expected[:, half:]
    got = multiply(
        x, weight.to(DEVICE), offset.to(DEVICE) if bias else None,
        norm=Norm(scale.to(DEVICE), 1e-6) if norm else None, add=stream.clone().to(DEVICE) if add else None, activation=activation,
    )  # fmt: skip
    torch.testing.assert_close(got.double().cpu(), expected, atol=tolerance, rtol=tolerance)
