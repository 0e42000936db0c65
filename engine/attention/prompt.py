"""Attention of one long prompt by cuDNN, by way of torch: a tenth to a fifth faster than `engine.kernels.paged_attention`, but it wants
keys and values that lie together, and plans for each length. So it is for steps that are one prompt from its beginning, as CUDA graphs
of their sizes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from penstock.engine.attention.base import LayerShape

LONG = 4096  # tokens from which it is faster, whatever the heads


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]` of the first tokens of a sequence, to `[tokens, heads, dim]`. Raises
    `RuntimeError` where cuDNN cannot do it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)[0].transpose(0, 1)


def suits_prompt(shape: LayerShape, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend_prompt` is the way for a layer, for as long as its pool is of `kv_dtype`."""
    plain = shape.softcap is None and shape.window is None and not shape.sinks and shape.head_dim == shape.value_dim
    return plain and dtype == kv_dtype and device.type == "cuda" and _can_attend(shape.heads, shape.kv_heads, shape.head_dim, dtype, device)


@cache
def _can_attend(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    q, k, v = (torch.zeros(128, count, dim, dtype=dtype, device=device) for count in (heads, kv_heads, kv_heads))
    try:
        attend_prompt(q, k, v, 1.0)
    except RuntimeError:  # torch says that it knows no way
        return False
    return True
