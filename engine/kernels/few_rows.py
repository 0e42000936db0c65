"""The product of a few rows with a weight, which is as fast as the weight can be read, and what comes before and after it in the same
launch: a norm of the rows, an activation and gate, a residual sum.

A program has a few of the weight's rows whole, so that all its loads are on their way before the kernel before it has ended. One or two
rows are multiplied number by number; for more, matrix instructions take 16 rows for the price of one, and each warp has its own part of
the inner dimension. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.gate import ACTIVATIONS, activate
from penstock.engine.kernels.overlap import overlap, wait
from penstock.engine.model.norm import Norm

SINGLE = 2  # rows that are multiplied number by number
MOST = 16  # rows: with more, or longer ones than NARROW, the library is faster, or a program would need more memory than it can have
WIDEST, NARROW = 16_384, 3072  # inner dimension of a single row, and of more
WARP = 2048  # numbers of the weight that a warp takes: 64 a thread
PART = 256  # of the inner dimension, at most, that a warp takes of each row
COLUMNS = 8  # of the result, that a program computes of many rows


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_single(  # type: ignore[no-untyped-def]
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


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _multiply_rows(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, add, out, x_row, inner, outer, rows, epsilon,
    ROWS: tl.constexpr, OUTER: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: OUTER columns of the result, of all rows, which are PARTS products, one a warp, until the end."""
    n = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    m = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS) * PART
    k = tl.arange(0, PART)
    there = n < outer
    places = n.to(tl.int64)[None, None, :] * inner + part[:, None, None] + k[None, :, None]
    mask = there[None, None, :] & (part[:, None, None] + k[None, :, None] < inner)
    w = tl.load(weight + places, mask=mask, other=0.0)
    if KIND >= 0:
        v = tl.load(weight + outer * inner + places, mask=mask, other=0.0)
    wait(OVERLAP)
    at = part[:, None, None] + k[None, None, :]
    a = tl.load(x + m[None, :, None] * x_row + at, mask=(m < rows)[None, :, None] & (at < inner), other=0.0)
    if NORM:
        b = a.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(b * b, 2), 0) / inner + epsilon)
        b = b * scale[None, :, None] * tl.load(norm + at, mask=at < inner, other=0.0).to(tl.float32)
        a = b.to(a.dtype)
    y = tl.sum(tl.dot(a, w, input_precision="ieee"), 0)
    if BIAS:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    if KIND >= 0:
        up = tl.sum(tl.dot(a, v, input_precision="ieee"), 0)
        if BIAS:
            up += tl.load(bias + outer + n, mask=there, other=0.0).to(tl.float32)[None, :]
        y = activate(y, KIND) * up
    place = m[:, None] * outer + n[None, :]
    mine = (m < rows)[:, None] & there[None, :]
    if ADD:
        y += tl.load(add + place, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mine)


def is_few(rows: int, widest: int) -> bool:
    """Whether `multiply_few` is the way for so many rows, if the longest inner dimension is `widest`."""
    return (rows == 1 and widest <= WIDEST) or (rows <= MOST and widest <= NARROW)


def multiply_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None = None, add: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`norm(x) @ weight.T + bias`, then one of these: plus `add`; or the activation of its first half times the other.

    x `[rows, in]` of a few rows; weight `[out, in]`, contiguous; add `[rows, out]`, contiguous. Returns `[rows, out]`, or half as wide.
    """
    rows, inner = x.shape
    outer = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((rows, outer), dtype=x.dtype, device=x.device)
    given = (x, weight, x if bias is None else bias, x if norm is None else norm.weight, x if add is None else add, out, x.stride(0))
    epsilon = 0.0 if norm is None else norm.epsilon
    kind = -1 if activation is None else ACTIVATIONS.index(activation)
    manner = {"NORM": norm is not None, "KIND": kind, "BIAS": bias is not None, "ADD": add is not None, **overlap(x)}
    padded = triton.next_power_of_2(inner)
    if rows <= SINGLE:
        block = 4 if activation is None and inner <= 8192 else 2 if inner <= 8192 else 1
        loads = block * padded * (1 if activation is None else 2)
        _multiply_single[(triton.cdiv(outer, block),)](
            *given, inner, outer, epsilon, ROWS=rows, OUTER=block, INNER=padded, **manner, num_warps=max(1, min(16, loads // WARP))
        )
    else:
        parts = max(4, padded // PART)
        _multiply_rows[(triton.cdiv(outer, COLUMNS),)](
            *given, inner, outer, rows, epsilon, ROWS=MOST, OUTER=COLUMNS, PARTS=parts, PART=padded // parts,
            **manner, num_warps=parts,
        )  # fmt: skip
    return out
