"""How many multiprocessors a device has, among which a kernel's programs are shared out."""

from __future__ import annotations

from functools import cache

import torch

ELSEWHERE = 4  # where there is no GPU


@cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else ELSEWHERE
