"""What a config says of a decoder: Llama, and the families that differ from it in a few places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention.base import LayerShape
from penstock.engine.model.rotary import Rotary, read_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"})
SCALED = frozenset({"gemma", "gemma2", "gemma3_text"})  # embeddings times the root of their width; norms keep their weights less one
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a config says of a decoder."""

    layers: tuple[LayerShape, ...]
    rotaries: tuple[Rotary, ...]  # of each layer
    vocab_size: int
    epsilon: float
    activation: Callable[[Tensor], Tensor]
    embedding_scale: float | None
    final_softcap: float | None
    unit_norms: bool  # norms keep their weights less one


def read_decoder(config: PreTrainedConfig, device: torch.device) -> Decoder | None:
    """The decoder that a config of transformers describes; None if it is none of `FAMILIES`, or says what is not known here."""
    activation = ACTIVATIONS.get(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or "")
    if config.model_type not in FAMILIES or activation is None or getattr(config, "use_bidirectional_attention", False):
        return None
    count = config.num_hidden_layers
    types: list[str | None] = list(getattr(config, "layer_types", None) or [None] * count)
    if not set(types) <= {None, "full_attention", "sliding_attention"}:
        return None
    rotary = {kind: read_rotary(config, kind, device) for kind in set(types)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    layers = tuple(
        LayerShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scaling=(getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
            softcap=getattr(config, "attn_logit_softcapping", None),
            window=None if kind == "full_attention" else window,
        )
        for kind in types
    )
    rotaries = tuple(found for kind in types if (found := rotary[kind]) is not None)
    if len(rotaries) != count:
        return None
    scaled = config.model_type in SCALED
    return Decoder(
        layers, rotaries, config.vocab_size, config.rms_norm_eps, activation,
        embedding_scale=config.hidden_size**0.5 if scaled else None,
        final_softcap=getattr(config, "final_logit_softcapping", None),
        unit_norms=scaled,
    )  # fmt: skip
