"""In what dtype keys and values are kept: that of the model, or eight bits, of which twice as many fit.

FP8 here is e4m3 (`float8_e4m3fn`: Micikevicius et al., arXiv:2209.05433): four bits of exponent, three of fraction. There is no scale, or
one of 1.0, because a float needs none to be precise: it errs by a sixteenth at most (2.6 % in the mean square) anywhere from 2^-6 to 448,
and by 2^-10 below, where 2^-9 is the smallest step. Keys after a norm of heads and a rotary embedding lie well inside: a head of `dim` has
the length sqrt(dim), but for the norm's weights; and values are sums over a normed input. It would fail where a model keeps a few
dimensions of its keys far from all others, as a large bias of the key product does: beyond 448 they are all alike. It would also fail where
most keys or values lie below 2^-6, whose fraction gets lost. `penstock bench kv` says what it does to a model.

Whoever stores saturates, so that only what was NaN is NaN. Whoever attends reads what was stored, in the same step too: a token sees of
itself and its neighbours what later tokens will see, however a prompt is cut into chunks. Products are of the queries' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine.model.spec import ModelError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
CAPABILITY = (8, 9)  # of a GPU that converts it


def choose_dtype(kv_dtype: str, dtype: torch.dtype, device: torch.device, *, deterministic: bool = False) -> torch.dtype:
    """What the setting `kv_dtype` ("auto" or "fp8") means for a model of `dtype` on a device. Raises `ModelError` (invalid_option)."""
    if kv_dtype == "auto":
        return dtype
    if kv_dtype != "fp8":
        raise ModelError("invalid_option", f"kv_dtype={kv_dtype!r}: must be auto or fp8")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        has, least = (".".join(map(str, version)) for version in (found, CAPABILITY))
        raise ModelError("invalid_option", f"kv_dtype=fp8: compute capability {has} of {device} is below {least} (Ada, Hopper): take auto")
    if device.type == "cpu" and deterministic:
        raise ModelError("invalid_option", "kv_dtype=fp8: on a CPU, deterministic needs keys and values in float32: take auto")
    return FP8


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a pool of `dtype` keeps it. What is too large for FP8 becomes 448, which torch's own conversion does not promise."""
    return x.clamp(-LARGEST, LARGEST).to(dtype) if dtype == FP8 else x


def raw(x: Tensor) -> Tensor:
    """x as something that torch can select, copy and fill: FP8, for which it cannot on every device, as its bytes (uint8)."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
