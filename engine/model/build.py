"""A spec becomes a model that the runner can run: the native decoder where it knows the family, else transformers' own code, adopted."""

from __future__ import annotations

import torch

from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.base import Model
from penstock.engine.model.decoder import FAMILIES, read_decoder
from penstock.engine.model.load import load_model
from penstock.engine.model.native import NativeModel
from penstock.engine.model.spec import ModelError, ModelSpec


def build_model(spec: ModelSpec, device: torch.device, decoder: str = "auto") -> Model:
    """Load the weights of `spec` and build its model. `decoder` is "auto", "native" or "adopted". Raises `ModelError`: as `load_model`
    does, and unsupported_model for a family that neither way, or not the one asked for, can run."""
    module = load_model(spec, device)
    config = module.config
    found = None if decoder == "adopted" else read_decoder(config, device)
    if found is None:
        if decoder == "native":
            known = ", ".join(sorted(FAMILIES))
            raise ModelError("unsupported_model", f"{spec.model_type}: the native decoder runs plain forms of {known}; use decoder=auto")
        return AdoptedModel(module)
    weights = {name: weight.detach() for name, weight in module.state_dict().items()}
    del module  # so that each weight is freed once it is packed
    return NativeModel(found, weights)
