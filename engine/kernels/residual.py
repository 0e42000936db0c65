"""Where a sublayer's output joins the residual stream, and the next one's input leaves it: RMSNorm, sum, RMSNorm, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.overlap import overlap, wait


@triton.jit(do_not_specialize=["h_row", "x_row"])  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    h, x, after, before, sums, out, h_row, x_row, width, epsilon,
    WIDTH: tl.constexpr, SUM: tl.constexpr, AFTER: tl.constexpr, BEFORE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < width
    wait(OVERLAP)
    y = tl.load(h + row * h_row + d, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        add = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
        if AFTER:
            add = add * tl.rsqrt(tl.sum(add * add, 0) / width + epsilon) * tl.load(after + d, mask=inside, other=0.0).to(tl.float32)
            add = add.to(out.dtype.element_ty).to(tl.float32)
        y = (y + add).to(sums.dtype.element_ty)
        tl.store(sums + row * width + d, y, mask=inside)
        y = y.to(tl.float32)
    if BEFORE:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / width + epsilon) * tl.load(before + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, y.to(out.dtype.element_ty), mask=inside)


def join_rows(h: Tensor, x: Tensor | None, after: Tensor | None, before: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """`h + norm(x, after)`, and the norm of that with the weight `before`.

    h `[rows, width]`, x the same or None: nothing is added. Weights `[width]`, or None: no norm there. Norms are computed in float32, and
    rounded once to h's dtype, with their weights, whatever dtype those have. Returns two tensors `[rows, width]`; the first is h itself
    if there is no x, and the second is the first if there is no `before`.
    """
    rows, width = h.shape
    if x is None and before is None:
        return h, h
    sums = h if x is None else torch.empty((rows, width), dtype=h.dtype, device=h.device)
    out = sums if before is None else torch.empty((rows, width), dtype=h.dtype, device=h.device)
    padded = triton.next_power_of_2(width)
    _join[(rows,)](
        h, h if x is None else x, h if after is None else after, h if before is None else before, sums, out,
        h.stride(0), 0 if x is None else x.stride(0), width, epsilon,
        WIDTH=padded, SUM=x is not None, AFTER=after is not None, BEFORE=before is not None,
        num_warps=min(16, max(1, padded // 512)), **overlap(h),
    )  # fmt: skip
    return sums, out
