"""The noise that the first pass of sampling computes, by itself. Triton reads a kernel's names from its module, so this is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.engine.kernels.sample import _noise_about


@triton.jit  # type: ignore[untyped-decorator]
def _about(hashes, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, _noise_about(tl.load(hashes + at).to(tl.uint64, bitcast=True)))


def noise_about(hashes: Tensor) -> Tensor:
    """Of int64 hashes, whose count is a power of 2; float32."""
    out = torch.empty(len(hashes), device=hashes.device)
    _about[(1,)](hashes, out, SIZE=len(hashes))
    return out
