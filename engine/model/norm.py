"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x²) + epsilon) * weight, in the three places where decoders have it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Norm:
    """Over the last dimension. A weight in float32 beside values in another dtype multiplies before rounding, as Gemma wants it."""

    __slots__ = ("epsilon", "shape", "weight")

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight, self.shape, self.epsilon = weight, (weight.shape[-1],), epsilon

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.rms_norm(x, self.shape, self.weight, self.epsilon)
        return F.rms_norm(x.float(), self.shape, self.weight, self.epsilon).to(x.dtype)


class HeadNorm:
    """Over each head of x `[tokens, heads, dim]`, with a weight for each: `[heads, dim]`."""

    __slots__ = ("epsilon", "weight")

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.to(self.weight.dtype), x.shape[-1:], None, self.epsilon) * self.weight).to(x.dtype)


class WidthNorm:
    """Over the query heads of x `[tokens, heads, dim]` all together, and over its key heads, which follow them."""

    __slots__ = ("keys", "queries")

    def __init__(self, queries: Norm, keys: Norm) -> None:
        self.queries, self.keys = queries, keys

    def __call__(self, x: Tensor) -> Tensor:
        flat, width = x.flatten(1), self.queries.shape[0]
        return torch.cat((self.queries(flat[:, :width]), self.keys(flat[:, width:])), -1).view(x.shape)


def head_norm(queries: Norm | None, keys: Norm | None, heads: int, kv_heads: int, dim: int) -> HeadNorm | WidthNorm | None:
    """The norm of queries and keys side by side: over each head (Qwen3, Gemma 3), or over all of a kind (OLMo-2)."""
    if queries is None or keys is None:
        return None
    if queries.shape != (dim,):
        return WidthNorm(queries, keys)
    return HeadNorm(torch.cat((queries.weight.expand(heads, -1), keys.weight.expand(kv_heads, -1))), queries.epsilon)
