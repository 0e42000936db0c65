"""One kernel and one size: what it must do, and how to have it done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from penstock.engine.attention.base import LayerShape
from penstock.engine.attention.storage import choose_dtype
from penstock.engine.bench.clock import Call
from penstock.engine.model.decoder import Decoder, read_decoder
from penstock.engine.model.experts import Mixture
from penstock.engine.model.spec import ModelError
from penstock.engine.model.weights import weight_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")

CACHE, CPU_CACHE = 2**28, 2**26  # bytes that no cache holds, four times over on a GPU; on a CPU others use the cache, too
MOST_COPIES = 1024  # what one adapter has for a product may be a tenth of a megabyte


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A kernel with so many `rows` (tokens; of decodes, streams). `bytes` are those that it cannot but read or write, each once; `flops`
    those of its products. `calls` do the same on different memory, so that weights, keys and values come from memory as they do in a step,
    which reads more of them than a cache holds; what the kernel before has written is near, as it is there."""

    kernel: str
    shape: str
    rows: int
    bytes: int
    flops: int
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model whose kernels are timed: sequences of up to `longest` tokens, whose keys and values are kept in
    `kv_dtype`. `inner` is the width of a feed-forward that is not made of experts. `joined`: where others have three products for
    queries, keys and values, and two for gate and up, it has one. `fused`: with the Triton kernels, as on CUDA."""

    decoder: Decoder
    hidden: int
    inner: int
    head_norms: bool
    joined: bool
    longest: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    fused: bool

    @property
    def shape(self) -> LayerShape:
        return self.decoder.layers[0]

    @property
    def qkv(self) -> int:
        """Columns of the product that gives queries, keys and values."""
        return (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim

    @property
    def mixture(self) -> Mixture | None:
        """The experts of those layers that have some; they are the same in all of them."""
        return next(filter(None, self.decoder.mixtures), None)

    @property
    def plain(self) -> bool:
        """Whether some layer has a feed-forward that is not made of experts."""
        return not all(self.decoder.mixtures)

    def draw(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers."""
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(0.0, scale)

    def copies(self, make: Callable[[], T], size: int) -> list[T]:
        """As many of a thing of `size` bytes as no cache holds together."""
        cache = CACHE if self.device.type == "cuda" else CPU_CACHE
        return [make() for _ in range(min(MOST_COPIES, -(-cache // size)))]


def read_subject(
    config: PreTrainedConfig, longest: int, dtype: torch.dtype, device: torch.device, *, fused: bool, kv_dtype: str = "auto"
) -> Subject:
    """Raises `ModelError` if `kv_dtype`, auto or fp8, cannot be done, or the native decoder does not know the family."""
    decoder = read_decoder(config, device)
    if decoder is None:
        raise ModelError("unsupported_model", f"{config.model_type}: the native decoder does not know it, so none of its kernels are timed")
    norms, joined = (f"model.layers.0.self_attn.{name}.weight" in weight_shapes(config) for name in ("q_norm", "qkv_proj"))
    stored = choose_dtype(kv_dtype, dtype, device)
    return Subject(decoder, config.hidden_size, config.intermediate_size, norms, joined, longest, dtype, stored, device, fused)
