"""Programmatic dependent launch: a kernel begins while the one before it ends, and reads what is its own (weights) before it waits.

CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"; from Hopper on. A kernel that is launched so must `wait` before
it reads what another kernel of the step wrote, and before it writes anything at all. What the step was told (columns, block tables) need
not be waited for: it was there before the first kernel, which is one of torch's and is not overlapped. Nor need keys of earlier steps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernel before this one is done; and let the one after it begin to wait for this."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def fetch(at, inside, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Have the lines of 128 bytes at these addresses on their way to the second-level cache, where `inside`, before they are needed."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
            [at.to(tl.int64), inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def overlap(x: Tensor, *, early: bool = True) -> dict[str, Any]:
    """How to launch a kernel on the device of x that begins with `wait(OVERLAP)`. Not `early`: when all that it depends on
    is done, which may be more than the kernel before; the one after it may begin early all the same."""
    return {"OVERLAP": True, "launch_pdl": early} if x.is_cuda and _can_overlap(x.device) else {"OVERLAP": False}


@cache
def _can_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
