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
from penstock.engine.model.experts import Mixture
from penstock.engine.model.rotary import Rotary, read_rotary
from penstock.engine.model.spec import MIXTURES, NATIVE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A config keeps whatever keys a file has, and each family reads only its own: so each is asked for only what it reads.
SLIDING = frozenset({"mistral", "phi3", "mixtral", "qwen3_moe"})  # every layer has the window
SLIDING_BY_TYPE = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text"})  # those layers that `layer_types` says
CAPPED = frozenset({"gemma2", "gemma3_text"})  # soft-caps, a scale of queries, and `hidden_activation`
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
    mixtures: tuple[Mixture | None, ...]  # the experts of each layer; None: it has one feed-forward
    vocab_size: int
    epsilon: float
    activation: str  # one of `ACTIVATIONS`
    embedding_scale: float | None
    final_softcap: float | None
    unit_norms: bool  # norms keep their weights less one


def read_decoder(config: PreTrainedConfig, device: torch.device) -> Decoder | None:
    """The decoder that a config of transformers describes; None if it is none of `NATIVE`, or says what is not known here."""
    family, count = config.model_type, config.num_hidden_layers
    capped = family in CAPPED
    activation = getattr(config, "hidden_activation" if capped else "hidden_act", None)
    if family not in NATIVE or activation not in ACTIVATIONS or getattr(config, "use_bidirectional_attention", False):
        return None
    types: list[str | None] = list(config.layer_types) if family in SLIDING_BY_TYPE else [None] * count
    windows = [getattr(config, "sliding_window", None) if family in SLIDING or kind == "sliding_attention" else None for kind in types]
    if not set(types) <= {None, "full_attention", "sliding_attention"} or any(window is not None and window < 1 for window in windows):
        return None
    if any(kind == "sliding_attention" and window is None for kind, window in zip(types, windows, strict=True)):
        return None
    if family == "qwen3_moe" and config.decoder_sparse_step < 1:
        return None
    if family == "olmoe" and (config.clip_qkv is not None or getattr(config, "sliding_window", None) is not None):
        return None  # clipped; or a window that its attention is given, but its mask does not have
    mixtures = read_mixtures(config)
    if any(mixture is not None and not 1 <= mixture.chosen <= mixture.experts for mixture in mixtures):
        return None
    rotary = {kind: read_rotary(config, kind, device) for kind in set(types)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = tuple(
        LayerShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scaling=(config.query_pre_attn_scalar if capped else head_dim) ** -0.5,
            softcap=config.attn_logit_softcapping if capped else None,
            window=window,
        )
        for window in windows
    )
    rotaries = tuple(found for kind in types if (found := rotary[kind]) is not None)
    if len(rotaries) != count:
        return None
    scaled = family in SCALED
    return Decoder(
        layers, rotaries, mixtures, config.vocab_size, config.rms_norm_eps, activation,
        embedding_scale=config.hidden_size**0.5 if scaled else None,
        final_softcap=config.final_logit_softcapping if capped else None,
        unit_norms=scaled,
    )  # fmt: skip


def read_mixtures(config: PreTrainedConfig) -> tuple[Mixture | None, ...]:
    """The experts of each layer of a decoder of `NATIVE`."""
    family, layers = config.model_type, range(config.num_hidden_layers)
    if family not in MIXTURES or config.num_experts < 1:
        return (None,) * len(layers)
    mixture = Mixture(
        experts=config.num_experts,
        chosen=config.num_experts_per_tok,
        inner=config.moe_intermediate_size if family == "qwen3_moe" else config.intermediate_size,
        renormalized=family == "mixtral" or config.norm_topk_prob,
        rounded=family != "mixtral",
    )
    step, plain = (config.decoder_sparse_step, config.mlp_only_layers) if family == "qwen3_moe" else (1, [])
    return tuple(None if i in plain or (i + 1) % step else mixture for i in layers)
