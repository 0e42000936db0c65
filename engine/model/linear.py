"""The one linear layer of the engine. What the weights look like is a *method*, so that quantization can come as another one."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.engine.kernels.cpu import PANEL, load_kernels
from penstock.engine.lora.base import Adapted
from penstock.engine.lora.layout import Group
from penstock.engine.model.invariant import Panels, invariant_method

PACK_FOR = 64  # rows that oneDNN chooses its blocking for: measured best, or near it, at every batch from 1 to 512
FEW = 8  # rows up to which our own product is faster: it reads weights as fast as memory gives them, and computes as one core does


class LinearMethod(Protocol):
    """Holds the weights of one layer and multiplies with them."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, same dtype."""
        ...


class Dense:
    """`x @ weight.T + bias`, with the weight `[out, in]` as it is."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Packed:
    """The same on a CPU, with the weight in oneDNN's blocked layout, packed once: torch's own float32 path packs it at every call,
    which costs 1.3 to 4 times the product at up to 64 rows.

    For a few rows oneDNN reads the weight at two thirds of the speed that memory has. Where its layout is the plain one of panels of 64
    outputs, and the kernels could be compiled, our own product reads the same bytes faster.
    """

    __slots__ = ("bias", "in_features", "kernels", "multiply", "out_features", "panels", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_FOR)
        self.bias = None if bias is None else bias.to(weight.dtype).clone()
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.out_features, self.in_features = weight.shape
        self.panels = find_panels(weight, self.weight)
        self.kernels = None if self.panels is None else load_kernels()

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernels is not None and self.panels is not None and x.dim() > 1 and x.shape[-2] <= FEW and x.dtype is torch.float32:
            rows = x if x.dim() == 2 else x[0] if x.dim() == 3 and len(x) == 1 else None  # the families' own code has a batch of one
            if rows is not None and rows.shape[1] == self.in_features and rows.stride(1) == 1:
                bias = None if self.bias is None else self.bias.data_ptr()
                y = self.kernels.multiply(rows, *self.panels, bias, self.out_features)
                return y if rows is x else y[None]
        return self.multiply(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def find_panels(weight: Tensor, packed: Tensor) -> tuple[int, int] | None:
    """The address of a packed weight and the depth of its panels, if it is `[ceil(out / PANEL), depth, PANEL]`. The layout is
    oneDNN's own affair, so it is looked at, not assumed: its first and last panels are compared with the weight."""
    if weight.dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    out_features, in_features = weight.shape
    count = -(-out_features // PANEL)
    address, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    depth, rest = divmod(size, 4 * PANEL * count)
    if rest or depth < in_features or address % 64:
        return None
    floats = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    panels = torch.from_numpy(np.ctypeslib.as_array(floats, (count, depth, PANEL)))
    for i in (0, count - 1):
        rows = weight[i * PANEL : (i + 1) * PANEL]
        if not torch.equal(panels[i, :in_features, : len(rows)].t(), rows):
            return None
    return address, depth


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch has the packed product for such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Linear(nn.Module):
    """Takes the place of `nn.Linear` and of GPT-2's `Conv1D`.

    `weight` is `[out, in]`, `bias` `[out]` or None. Where the weight was packed, `weight` becomes a stand-in of the same shape, dtype and
    device that takes no memory and is NaN all over: family code may look at it, and whatever would compute with it fails loudly.
    `deterministic`: the bits of a row of the product do not depend on the others; raises `ModelError` where there is no such way.
    `group`: what adapters may change of it, one site for each part of its outputs; `adapted` is then what changes it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, deterministic: bool = False, group: Group = ()) -> None:
        super().__init__()
        self.group = group
        self.adapted: Adapted | None = None
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.out_features, self.in_features = weight.shape
        self.method: LinearMethod
        if deterministic:
            self.method = invariant_method(weight, bias)
        else:
            self.method = Packed(weight, bias) if can_pack(weight) else Dense(weight, bias)
        if isinstance(self.method, Packed | Panels):
            weight = torch.full((), float("nan"), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:  # straight to the method: a step of one token spends a fifth of its time on calls
        adapted = self.adapted
        return self.method(x) if adapted is None or not adapted.backend.active else adapted.multiply(self.method, x)

    forward = __call__

    @property
    def adds(self) -> bool:
        """Whether there is `add`."""
        return isinstance(self.method, Dense) and self.bias is None

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        """h `[tokens, out]` plus the product of x `[tokens, in]`, in the memory of h: what the product alone makes is never written."""

        def add(x: Tensor) -> Tensor:
            return h.addmm_(x, self.weight.t())

        adapted = self.adapted
        return add(x) if adapted is None or not adapted.backend.active else adapted.multiply(add, x)
