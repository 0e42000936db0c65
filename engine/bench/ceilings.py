"""What the device gives at most, measured: bytes and floating-point operations a second. Floors are made of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penstock.engine.bench.clock import time_calls

PART = 2**29 - 2**20  # float32 numbers read at once: what torch still counts in 32 bits
CPU_PART = 2**25
SIDE, CPU_SIDE = 8192, 1536  # of the square matrices that are multiplied


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`read` and `copy` are bytes a second (a copy's are those that it reads and those that it writes), `multiply` is flops a second in
    the dtype of the model, `empty` the seconds of a call with next to nothing to do."""

    read: float
    copy: float
    multiply: float
    empty: float

    @property
    def bandwidth(self) -> float:
        """The best that was seen, bytes a second."""
        return max(self.read, self.copy)

    def floor(self, bytes: int, flops: int) -> float:
        """The least seconds for so much work."""
        return max(bytes / self.bandwidth, flops / self.multiply)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """On random values: on zeros a device draws less power, and is faster than it ever is at work."""
    read, copy = _bandwidths(device)
    side = SIDE if device.type == "cuda" else CPU_SIDE
    matrices = [torch.empty((side, side), dtype=dtype, device=device).normal_() for _ in range(2)]
    multiply = time_calls([lambda: F.linear(*matrices)], device)
    one = torch.rand(1, device=device)
    return Ceilings(read, copy, 2 * side**3 / multiply, time_calls([lambda: one.mul_(0.99)], device))


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a read and of a copy."""
    on_cuda = device.type == "cuda"
    first, second = (torch.empty(PART if on_cuda else CPU_PART, dtype=torch.float32, device=device).normal_() for _ in range(2))
    seconds = time_calls([first.sum, second.sum], device)
    if on_cuda:  # of integers, too: their sum has no order to keep to
        seconds = min(seconds, time_calls([first.view(torch.int32).sum, second.view(torch.int32).sum], device))
    return first.nbytes / seconds, 2 * first.nbytes / time_calls([lambda: first.copy_(second)], device)
