"""The product of a few rows with a weight, which is as fast as the weight can be read, and what comes before and after it in the same
launch: a norm of the rows, an activation and gate, a residual sum.

A program has a few of the weight's rows whole, so that all its loads are on their way before the kernel before it has ended. Sums are in
float32. With more rows the library is as fast: it has matrix instructions, which take eight rows for the price of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.gate import ACTIVATIONS, activate
from penstock.engine.kernels.overlap import overlap, wait
from penstock.engine.model.norm import Norm

WIDEST = 16_384  # inner dimension of a single row
NARROW = 3072  # of two rows
WARP = 2048  # numbers of the weight that a warp takes: 64 a thread


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, add, out, x_row, inner, outer, epsilon,
    ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: OUTER columns of the result, of all rows. KIND below 0: no gate."""
    n = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    k = tl.arange(0, INNER)
    inside = k < inner
    there = n < outer
    mask = there[:, None] & inside[None, :]
    places = n.to(tl.int64)[:, None] * inner + k[None, :]
    w = tl.load(weight + places, mask=mask, other=0.0)
    if KIND >= 0:
        v = tl.load(weight + outer * inner + places, mask=mask, other=0.0)
    wait(OVERLAP)
    if NORM:
        scales = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        a = tl.load(x + row * x_row + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            a = a * tl.rsqrt(tl.sum(a * a, 0) / inner + epsilon) * scales
            a = a.to(x.dtype.element_ty).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * a[None, :], 1)
        if BIAS:
            y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
        if KIND >= 0:
            up = tl.sum(v.to(tl.float32) * a[None, :], 1)
            if BIAS:
                up += tl.load(bias + outer + n, mask=there, other=0.0).to(tl.float32)
            y = activate(y, KIND) * up
        if ADD:
            y += tl.load(add + row * outer + n, mask=there, other=0.0).to(tl.float32)
        tl.store(out + row * outer + n, y.to(out.dtype.element_ty), mask=there)


def is_few(rows: int, widest: int) -> bool:
    """Whether `multiply_few` is the way for so many rows, if the longest inner dimension is `widest`."""
    return (rows == 1 and widest <= WIDEST) or (rows == 2 and widest <= NARROW)


def multiply_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None = None, add: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`norm(x) @ weight.T + bias`, then one of these: plus `add`; or the activation of its first half times the other.

    x `[rows, in]`, see `is_few`; weight `[out, in]`, contiguous; add `[rows, out]`, contiguous. Returns `[rows, out]`, or half as wide.
    """
    rows, inner = x.shape
    outer = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((rows, outer), dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(inner)
    block = 1 if inner > WIDEST // 2 else 4 if activation is None else 2  # a gate has two weights
    loads = block * padded * (1 if activation is None else 2)
    _multiply[(triton.cdiv(outer, block),)](
        x, weight, x if bias is None else bias, x if norm is None else norm.weight, x if add is None else add, out,
        x.stride(0), inner, outer, 0.0 if norm is None else norm.epsilon,
        ROWS=rows, OUTER=block, INNER=padded, NORM=norm is not None, KIND=-1 if activation is None else ACTIVATIONS.index(activation),
        BIAS=bias is not None, ADD=add is not None, num_warps=max(1, min(16, loads // WARP)), **overlap(x),
    )  # fmt: skip
    return out
