"""Trains the three LoRA adapters of the tiny model: each turns its answers into another style.

    python -m examples.tiny.adapters --corpus corpus --model tiny

They are written below the model's folder, in the format of the peft library.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from examples.tiny.data import IGNORED, Document, load_documents, padded_rows

LONGEST = 256  # tokens of a document; a style shows in its first lines
WARMUP = 20


@dataclass(frozen=True)
class Adapter:
    """An adapter's name, its size, how fast it learns, and the layers that it changes."""

    name: str
    rank: int
    rate: float
    targets: tuple[str, ...]


# Different ranks and targets on purpose: whoever serves several adapters at once has to cope with such a mix.
ADAPTERS = (
    Adapter("shout", 4, 6e-3, ("q_proj", "v_proj")),
    Adapter("python", 8, 3e-3, ("q_proj", "k_proj", "v_proj", "o_proj")),
    Adapter("list", 16, 2e-3, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
)


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train one adapter."""

    steps: int = 500
    rows: int = 32
    seed: int = 0


def loss_of(model: PeftModel, documents: list[Document], device: torch.device) -> torch.Tensor:
    inputs, labels = padded_rows(documents, LONGEST)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=inputs.to(device), use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.to(device).flatten(), ignore_index=IGNORED)


def held_out_loss(model: PeftModel, documents: list[Document], rows: int, device: torch.device) -> float:
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, documents[start : start + rows], device).item() for start in range(0, len(documents), rows)]
    model.train()
    return sum(losses) / len(losses)


def train_adapter(adapter: Adapter, folder: Path, corpus: Path, recipe: Recipe, device: torch.device) -> dict[str, float | int | list[str]]:
    """Trains one adapter on the frozen model in *folder*, saves it below, and returns its losses."""
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = load_documents(corpus / f"{adapter.name}.train.jsonl.gz", tokenizer)
    held_out = load_documents(corpus / f"{adapter.name}.val.jsonl.gz", tokenizer)[: 8 * recipe.rows]
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank,
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).to(device)
    before = held_out_loss(model, held_out, recipe.rows, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=adapter.rate, weight_decay=0.0)
    model.train()
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = adapter.rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        torch.autograd.backward(loss_of(model, rng.sample(documents, min(recipe.rows, len(documents))), device))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_loss(model, held_out, recipe.rows, device)
    print(f"{adapter.name}: validation {before:.3f} without, {after:.3f} with the adapter", flush=True)
    save_adapter(model, folder / "adapters" / adapter.name)
    return {**asdict(adapter), "val_before": before, "val_after": after}


def save_adapter(model: PeftModel, folder: Path) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    config = model.peft_config["default"]
    config.base_model_name_or_path = "tiny"  # not the path of this run
    config.target_modules = sorted(config.target_modules)  # a set would be written in a new order every time
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template; the model's card describes its adapters


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model's adapters.")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder that corpus.py wrote")
    parser.add_argument("--model", type=Path, default=Path("tiny"), help="folder that train.py wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--rows", type=int, default=Recipe.rows)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    recipe = Recipe(options.steps, options.rows, seed=options.seed)
    torch.set_float32_matmul_precision("high")
    record_path = options.model / "training.json"
    record = json.loads(record_path.read_text(encoding="utf-8"))
    for adapter in ADAPTERS:
        result = train_adapter(adapter, options.model, options.corpus, recipe, torch.device(options.device))
        record["adapters"][adapter.name] = result
    record_path.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
