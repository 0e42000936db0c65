"""Rotary position embeddings: pairs of a head's dimensions turn by an angle that grows with the position (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.engine.model.values import ROTARIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PLAIN = "default"
KINDS = (*ROTARIES, "yarn", "longrope", "dynamic")  # those whose frequencies do not depend on the rest of the batch,
# given that `engine.model.spec` limits the length of the last two to where they do not


class Rotary:
    """The angles of one kind of layer. `frequencies` float32 `[pairs]`, radians a position; `scaling` multiplies what is turned."""

    __slots__ = ("frequencies", "scaling")

    def __init__(self, frequencies: Tensor, scaling: float) -> None:
        self.frequencies, self.scaling = frequencies, scaling

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rotate` needs for tokens at `positions` `[tokens]`: two tensors `[tokens, 1, 2 * pairs]`, rounded as transformers does."""
        angles = positions.float()[:, None] * self.frequencies
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at each position below `length`, float32 `[length, pairs]`, scaled."""
        angles = torch.arange(length, device=self.frequencies.device).float()[:, None] * self.frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of x `[tokens, heads, dim]`; a pair lies half of them apart."""
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cos, sin), x[..., turned:]), -1)
    return torch.addcmul(x * cos, torch.roll(x, turned // 2, -1), sin)


def read_rotary(config: PreTrainedConfig, layer_type: str | None, device: torch.device) -> Rotary | None:
    """The rotary embedding of a config's layers, or of those of one type where types differ; None for a kind that is not known here."""
    every: Mapping[str, Any] = config.rope_parameters
    nested = layer_type is not None and isinstance(every.get(layer_type), Mapping)
    given: Mapping[str, Any] = every[str(layer_type)] if nested else every
    kind, share = given.get("rope_type", PLAIN), given.get("partial_rotary_factor") or 1.0
    if kind not in KINDS or (share != 1.0 and config.model_type != "phi3"):  # the others of our families ignore it in their plain form only
        return None
    if kind not in ROTARIES:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, device, **({"layer_type": layer_type} if nested else {}))
        return Rotary(frequencies.float(), float(scaling))
    dim = int((getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * share)
    frequencies = 1.0 / (given["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if kind == "linear":
        frequencies = frequencies / given["factor"]
    elif kind == "llama3":
        frequencies = _stretch_long(frequencies, given)
    return Rotary(frequencies.to(device), 1.0)


def _stretch_long(frequencies: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Long waves turn slower by a factor, short ones as they did, and those between by some of it (Llama 3.1; Grattafiori et al., 2024)."""
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    waves = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # of the original length
    share = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    found: Tensor = (1 - share) * frequencies / given["factor"] + share * frequencies
    return found
