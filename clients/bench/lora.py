"""Random LoRA adapters on disk, as peft saves them, for a bench: nothing is downloaded, and every one is different.

One of an 8B model takes 84 MB, and 128 of them 10 GB. So random numbers are drawn once, and each adapter is a cut of them that begins at
another place: writing it takes what the disk takes. The format of safetensors is written here, since a cut is all of a file but its
header, and the library's own binding takes the weights in another way from one release to the next.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import penstock.engine
from penstock.clients.bench.shapes import SHAPES
from penstock.clients.errors import InvalidRequest, PenstockError

PAGE = 16  # ranks in a page of the device: `engine.lora.layout.RANKS`, which would import torch
_STEP = 128  # bytes from where one adapter begins in the random numbers to where the next one does
_DRAWN = 1 << 20  # bytes that are drawn at once: `randbytes` has a limit


def pages_of(ranks: Sequence[int], count: int) -> list[int]:
    """Pages that each of `count` adapters takes on the device, with `ranks` in turn."""
    return [-(-ranks[number % len(ranks)] // PAGE) for number in range(count)]


def config_of(model: str) -> dict[str, Any]:
    """What the config.json of a shape, a folder or `tiny` says. Raises `InvalidRequest`."""
    if model in SHAPES:
        return SHAPES[model]
    folder = Path(penstock.engine.__path__[0]) / "tiny" if model == "tiny" else Path(model)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        limit = "tiny, a folder with a config.json, or one of " + ", ".join(SHAPES)
        raise InvalidRequest(f"model={model!r}: must be {limit}", field="model", value=model, limit=limit) from error
    return config


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """All products of a Llama-like decoder that adapters may change: in and out features, by name. Experts are not among them. Raises
    `InvalidRequest` if the config does not say their sizes."""
    try:
        layers = range(config["num_hidden_layers"])
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    except KeyError as error:
        limit = "a model whose config.json has the sizes of a decoder such as Llama"
        name = str(config.get("model_type"))
        raise InvalidRequest(f"model_type={name}: {error} is missing: must be {limit}", field="model", value=name, limit=limit) from error
    wide = config.get("head_dim") or hidden // heads
    q, kv = heads * wide, (config.get("num_key_value_heads") or heads) * wide
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    dense = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    parts = {"self_attn": attention} | ({} if {"num_experts", "num_local_experts"} & config.keys() else {"mlp": dense})
    return {
        f"model.layers.{layer}.{part}.{name}": sizes for layer in layers for part, found in parts.items() for name, sizes in found.items()
    }


def write_adapters(config: dict[str, Any], folder: Path, count: int, ranks: Sequence[int], *, flush: bool = False) -> list[Path]:
    """Folders of `count` adapters of the model with this config, on all its linears, in bfloat16, with `ranks` in turn. `flush`: they are
    on the disk then, and no longer in memory. Raises `InvalidRequest`, and `PenstockError` if the disk does not take them."""
    headers = {rank: _header(config, rank) for rank in ranks[:count]}
    noise = memoryview(_noise(max(size for _, size in headers.values()) + count * _STEP))
    modules = sorted({name.rpartition(".")[2] for name in linears(config)})
    made = [folder / str(number) for number in range(count)]
    try:
        for number, path in enumerate(made):
            rank = ranks[number % len(ranks)]
            header, size = headers[rank]
            path.mkdir(parents=True)
            values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
            (path / "adapter_config.json").write_text(json.dumps(values))
            with (path / "adapter_model.safetensors").open("wb") as file:
                file.write(header)
                file.write(noise[number * _STEP : number * _STEP + size])
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise PenstockError(f"cannot write {count} adapters to {folder}: {error}") from error
    return made


def _header(config: dict[str, Any], rank: int) -> tuple[bytes, int]:
    """What a file of safetensors begins with, and the bytes of the weights that follow."""
    entries: dict[str, Any] = {}
    end = 0
    for module, (inner, outer) in linears(config).items():
        for side, shape in (("A", (rank, inner)), ("B", (outer, rank))):
            begin, end = end, end + 2 * shape[0] * shape[1]
            entries[f"base_model.model.{module}.lora_{side}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def _noise(size: int) -> bytearray:
    """bfloat16 of both signs and of 2^-7 to 2^-5: the lower byte, of the fraction and of the exponent's last bit, is anything, of the upper
    one only the sign."""
    draw = random.Random(0)
    upper = bytes(0x3C | byte & 0x80 for byte in range(256))
    drawn = bytearray().join(draw.randbytes(_DRAWN) for _ in range(-(-size // _DRAWN)))
    drawn[1::2] = drawn[1::2].translate(upper)
    return drawn
