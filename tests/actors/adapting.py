"""Adapters of the tiny model made for tests, and what peft says with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from penstock.engine.open import TINY

SIZES = {"q_proj": (256, 256), "v_proj": (256, 128), "o_proj": (256, 256), "down_proj": (640, 256), "up_proj": (256, 640)}
LAYERS = 7
PROMPT = [1, 5, 9, 200, 31, 77, 8, 400, 12, 5, 64, 1000]


def write_adapter(folder: Path, seed: int, rank: int = 4, modules: Sequence[str] = ("q_proj", "v_proj"), **config: Any) -> Path:
    """Random weights, strong enough that every adapter says something else."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            part = "self_attn" if module in ("q_proj", "v_proj", "o_proj") else "mlp"
            name, (inner, outer) = f"base_model.model.model.layers.{layer}.{part}.{module}", SIZES[module]
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inner, generator=draw) / inner**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outer, rank, generator=draw) / rank**0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def expected(folder: Path | None, tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """What peft generates, greedily, with no end of a sequence."""
    model: Any = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder)
    last, cache, ids = torch.tensor([list(prompt)]), None, []
    with torch.inference_mode():
        for _ in range(tokens):
            out = model(input_ids=last, past_key_values=cache, use_cache=True)
            last, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            ids.append(int(last))
    return ids
