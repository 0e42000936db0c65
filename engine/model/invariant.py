"""Ways to multiply, and to activate, whose bits for a row do not depend on which other rows there are: for `deterministic`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.kernels.cpu import PANEL, load_kernels
from penstock.engine.model.spec import ModelError


class Tiled:
    """On CUDA: `engine.kernels.product`, one tile whatever the number of rows. The weight `[out, in]` stays as it is."""

    __slots__ = ("bias", "multiply", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from penstock.engine.kernels.product import multiply_rows  # Triton comes with CUDA builds of torch only

        self.weight, self.bias, self.multiply = weight.contiguous(), bias, multiply_rows

    def __call__(self, x: Tensor) -> Tensor:
        y = self.multiply(_rows(x, self.weight.shape, self.weight.dtype), self.weight, self.bias)
        return y.view(*x.shape[:-1], len(self.weight))


class Panels:
    """On a CPU, in float32: our own product for any number of rows. Each output of a row is summed in order by one thread; the weight
    lies in panels `[ceil(out / 64), in, 64]`, made here. oneDNN chooses by the number of rows. Raises `ModelError` (invalid_option)."""

    __slots__ = ("bias", "kernels", "panels", "shape")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        kernels = load_kernels()
        if weight.dtype != torch.float32:
            raise ModelError("invalid_option", f"deterministic: on a CPU only in float32, not in {weight.dtype}")
        if kernels is None:
            raise ModelError("invalid_option", "deterministic: on a CPU it needs a C compiler with OpenMP")
        self.kernels, self.shape = kernels, weight.shape
        outer, inner = weight.shape
        self.panels = F.pad(weight, (0, 0, 0, -outer % PANEL)).view(-1, PANEL, inner).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.to(weight.dtype).clone()

    def __call__(self, x: Tensor) -> Tensor:
        outer, inner = self.shape
        bias = None if self.bias is None else self.bias.data_ptr()
        y = self.kernels.multiply(_rows(x, self.shape, torch.float32), self.panels.data_ptr(), inner, bias, outer)
        return y.view(*x.shape[:-1], outer)


def _rows(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """x `[..., in]` as `[rows, in]` with the numbers of a row side by side. Raises `RuntimeError` if it does not fit the weight."""
    if x.shape[-1] != shape[1] or x.dtype != dtype:
        raise RuntimeError(f"a weight {tuple(shape)} of {dtype} does not multiply {tuple(x.shape)} of {x.dtype}")
    rows = x.reshape(-1, shape[1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def invariant_method(weight: Tensor, bias: Tensor | None) -> Tiled | Panels:
    """For a weight `[out, in]` on its device. Raises `ModelError` (invalid_option)."""
    return Panels(weight, bias) if weight.device.type == "cpu" else Tiled(weight, bias)


# torch's own on a CPU take the last numbers of a tensor, and of each thread's part, by another function than those before. These are made
# of operations that do not.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1.0 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))),
}
