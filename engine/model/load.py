"""A spec becomes a transformers module with weights: loaded from safetensors, or drawn at random from a config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from penstock.engine.model.spec import ModelError, ModelSpec, read_family, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(spec: ModelSpec) -> PreTrainedConfig:
    """As transformers understands it. Raises `ModelError` (unsupported_model)."""
    what = f"{spec.model_type}: this version of transformers cannot read its config"
    return cast("PreTrainedConfig", read_family(spec.folder, "unsupported_model", what))


def load_model(spec: ModelSpec, device: torch.device) -> PreTrainedModel:
    """Build the causal language model of `spec` on `device`, in `spec.dtype`, ready for inference.

    Code that comes with a model is never run. Raises `ModelError`: unsupported_model, broken_config, broken_weights, out_of_memory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # an executor's output is a log
    config = read_config(spec)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError("unsupported_model", f"{spec.model_type}: transformers knows no causal language model of this family")
    try:
        model = _draw(config, spec, device) if spec.random else _load(spec, device)
    except torch.OutOfMemoryError as error:
        raise ModelError("out_of_memory", f"{spec.source}: its weights do not fit on {device}: {error}") from error
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _draw(config: Any, spec: ModelSpec, device: torch.device) -> Any:
    """Every family's own initialisation, run directly on the device, so that its buffers come out right; seeded, and without a trace in
    the process's own generators."""
    from transformers import AutoModelForCausalLM

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(spec.seed)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[spec.dtype], attn_implementation="eager", trust_remote_code=False)


def _load(spec: ModelSpec, device: torch.device) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    weight_files(spec.folder)
    try:
        model, facts = AutoModelForCausalLM.from_pretrained(
            spec.folder,
            dtype=DTYPES[spec.dtype],
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError("broken_weights", f"{spec.folder}: {error}") from error
    if facts["missing_keys"]:
        names = sorted(facts["missing_keys"])
        raise ModelError("broken_weights", f"{spec.folder}: {len(names)} weights are missing: {', '.join(names[:5])}")
    return model.to(device)
