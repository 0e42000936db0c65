"""The middle of a feed-forward: the activation of one half of a row times the other half."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import overlap, wait

BLOCK = 1024
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@triton.jit  # type: ignore[untyped-decorator]
def activate(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """`ACTIVATIONS[KIND]` of a float32 block."""
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))


@triton.jit(do_not_specialize=["width"])  # type: ignore[untyped-decorator]
def _gate(x, out, width, BLOCK: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    wait(OVERLAP)
    gate = tl.load(x + row * 2 * width + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=inside)


def gate_rows(x: Tensor, activation: str) -> Tensor:
    """x `[rows, 2 * width]`, contiguous, to `activation(x[:, :width]) * x[:, width:]`; computed in float32. `activation` is one of
    `ACTIVATIONS`, by the names of transformers."""
    rows, width = len(x), x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    _gate[(rows, triton.cdiv(width, BLOCK))](x, out, width, BLOCK=BLOCK, KIND=ACTIVATIONS.index(activation), num_warps=4, **overlap(x))
    return out
