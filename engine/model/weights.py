"""The weights of a native decoder: straight from their files to the device, by several threads, or drawn there from a config alone.

The families' own code is not even imported for this, which takes seconds. Whatever is not exactly as expected is left to it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.engine.model.decoder import SCALED, read_mixtures
from penstock.engine.model.spec import ModelError, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

THREADS = 8  # one alone copies 22 GB/s from memory that is not pinned, of the 55 that an H200 can take
# Where `attention_bias` says so, all four of them.
BIASED = frozenset({"llama", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "qwen3_moe", "olmoe"})

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(config: PreTrainedConfig) -> Shapes:
    """The weights of a decoder that `engine.model.decoder` knows, by the names of transformers, without a head that is tied."""
    family, hidden, inner = config.model_type, config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or hidden // heads
    products = {"self_attn.q_proj": heads * dim, "self_attn.k_proj": kv_heads * dim, "self_attn.v_proj": kv_heads * dim}
    products |= {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    if family == "phi3":
        products = {"self_attn.qkv_proj": (heads + 2 * kv_heads) * dim, "mlp.gate_up_proj": 2 * inner}
    layer: Shapes = {f"{name}.weight": (size, hidden) for name, size in products.items()}
    layer |= {"self_attn.o_proj.weight": (hidden, heads * dim), "mlp.down_proj.weight": (hidden, inner)}
    biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if family == "qwen2" else []
    if family in BIASED and config.attention_bias:
        biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    if family == "llama" and config.mlp_bias:
        biased += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layer |= {f"{name}.bias": layer[f"{name}.weight"][:1] for name in biased}
    norms = {"post_attention_layernorm"} | ({"post_feedforward_layernorm"} if family == "olmo2" else {"input_layernorm"})
    if family in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    layer |= {f"{name}.weight": (hidden,) for name in norms}
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    elif family in ("olmo2", "olmoe"):
        layer |= {"self_attn.q_norm.weight": (heads * dim,), "self_attn.k_norm.weight": (kv_heads * dim,)}
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i, mixture in enumerate(read_mixtures(config)):
        own = layer
        if mixture is not None:
            own = {name: shape for name, shape in layer.items() if not name.startswith("mlp.")}
            own["mlp.gate.weight"] = (mixture.experts, hidden)
            own["mlp.experts.gate_up_proj"] = (mixture.experts, 2 * mixture.inner, hidden)
            own["mlp.experts.down_proj"] = (mixture.experts, hidden, mixture.inner)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return shapes


@dataclass(frozen=True, slots=True)
class Place:
    """What a file has under some name: the weight `name`, or some rows of one expert of it. `shape` is what the file has."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0


def file_places(config: PreTrainedConfig) -> dict[str, Place]:
    """The same weights by their names in files, where each expert has tensors of its own."""
    mixtral = config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    places: dict[str, Place] = {}
    for name, shape in weight_shapes(config).items():
        known = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        if len(shape) < 3:
            places[known] = Place(name, shape)
            continue
        layer, stack = known.rsplit(".", 1)
        parts = (gate, up) if stack == "gate_up_proj" else (down,)
        rows = shape[1] // len(parts)
        for expert in range(shape[0]):
            for at, part in enumerate(parts):
                places[f"{layer}.{expert}.{part}.weight"] = Place(name, (rows, shape[2]), expert, at * rows)
    return places


def draw_weights(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Matrices, and stacks of them, of normal numbers, as wide as the config says; norms that change nothing; no biases. The same for the
    same seed, on the same kind of device. Raises `ModelError` (out_of_memory)."""
    generator = torch.Generator(device).manual_seed(seed)
    norm = 0.0 if config.model_type in SCALED else 1.0

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) > 1:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, config.initializer_range, generator=generator)
        return torch.full(shape, norm if name.endswith(".weight") else 0.0, dtype=dtype, device=device)

    try:
        return {name: draw(name, shape) for name, shape in weight_shapes(config).items()}
    except torch.OutOfMemoryError as error:
        raise ModelError("out_of_memory", f"random weights do not fit on {device}: {error}") from error


def read_weights(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor] | None:
    """From safetensors. None if there are not just those that are expected, in their shapes: there are other ways to write them down, and
    the family's own loading knows them, or says what is wrong. Raises `ModelError` (broken_weights, missing_weights, out_of_memory)."""
    from safetensors import SafetensorError, safe_open

    places = file_places(config)
    where: list[tuple[Path, str]] = []
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  it is not a dict
            if config.tie_word_embeddings:
                found.pop("lm_head.weight", None)  # written down all the same
            if any(name not in places or places[name].shape != shape for name, shape in found.items()):
                return None
            where += [(path, name) for name in found]
        if {name for _, name in where} != places.keys() or len(where) != len(places):
            return None
        shapes = weight_shapes(config)
        stacked = dict.fromkeys(place.name for place in places.values() if place.expert is not None)
        stacks = {name: torch.empty(shapes[name], dtype=dtype, device=device) for name in stacked}

        def read(part: list[tuple[Path, str]]) -> dict[str, Tensor]:
            weights: dict[str, Tensor] = {}
            for path in dict.fromkeys(path for path, _ in part):
                with safe_open(path, framework="pt") as file:
                    for place, name in ((places[name], name) for at, name in part if at == path):
                        weight = file.get_tensor(name)
                        if place.expert is None:
                            weights[place.name] = weight.to(device, dtype)
                        else:
                            stacks[place.name][place.expert, place.first : place.first + len(weight)].copy_(weight)
            return weights

        with ThreadPoolExecutor(THREADS) as pool:
            parts = pool.map(read, [where[first::THREADS] for first in range(THREADS)])
            return stacks | {name: weight for part in parts for name, weight in part.items()}
    except torch.OutOfMemoryError as error:
        raise ModelError("out_of_memory", f"{folder}: its weights do not fit on {device}: {error}") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError("broken_weights", f"{folder}: {error}") from error
