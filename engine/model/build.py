"""A spec becomes a model that the runner can run: the native decoder where it knows the family, else transformers' own code, adopted."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.base import Model
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.load import DTYPES, load_model, read_config
from penstock.engine.model.native import NativeModel
from penstock.engine.model.spec import NATIVE, ModelError, ModelSpec
from penstock.engine.model.values import still_holds
from penstock.engine.model.weights import draw_weights, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def build_model(
    spec: ModelSpec, device: torch.device, decoder: str = "auto", *, deterministic: bool = False, values: Mapping[str, Any] | None = None
) -> Model:
    """Load the weights of `spec` and build its model. `decoder` is "auto", "native" or "adopted". `deterministic`: a token's bits do not
    depend on what else is in a step. `values`: what `engine.model.values` read of the config, if it did. Raises `ModelError`: as
    `load_model` does, unsupported_model for a family that neither way, or not the one asked for, can run, or can be deterministic, and
    invalid_option for a device or dtype that cannot."""
    config: Any = read_config(spec) if values is None or not still_holds(values, spec.folder) else SimpleNamespace(**values)
    found = None if decoder == "adopted" else read_decoder(config, device)
    if found is not None and (weights := _weights(spec, config, device)) is not None:
        return NativeModel(found, weights, deterministic=deterministic)
    if found is None and decoder == "native":
        known = ", ".join(sorted(NATIVE))
        raise ModelError("unsupported_model", f"{spec.model_type}: the native decoder runs plain forms of {known}; use decoder=auto")
    module = load_model(spec, device)
    if found is None:
        return AdoptedModel(module, deterministic=deterministic)
    weights = {name: weight.detach() for name, weight in module.state_dict().items()}
    del module  # so that each weight is freed once it is packed
    return NativeModel(found, weights, deterministic=deterministic)


def _weights(spec: ModelSpec, config: PreTrainedConfig, device: torch.device) -> dict[str, Tensor] | None:
    dtype = DTYPES[spec.dtype]
    return draw_weights(config, dtype, device, spec.seed) if spec.random else read_weights(spec.folder, config, dtype, device)
