"""Trains the tiny model that ships with the package, on a CPU or on one GPU.

    python -m examples.tiny.corpus --docs <documentation sources> --output corpus
    python -m examples.tiny.train --corpus corpus --output tiny
    python -m examples.tiny.adapters --corpus corpus --model tiny
    python -m examples.tiny.card --model tiny

On a GPU all of it takes a few minutes, on a CPU many hours.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from examples.tiny.data import Document, load_documents, load_texts, packed_rows
from examples.tiny.vocabulary import BOS, END, EOS, PAD, SPECIAL, VOCABULARY, save_tokenizer, train_tokenizer

CONTEXT = 2048


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train."""

    steps: int = 2000
    rows: int = 32  # of CONTEXT tokens, in one step
    rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.4  # more than usual, against learning the small corpus by heart
    dropout: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """The losses at one step."""

    step: int
    train: float
    val: float


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=[SPECIAL.index(EOS), SPECIAL.index(END)],
        pad_token_id=SPECIAL.index(PAD),
        dtype="float32",
    )


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(configuration())
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")) and isinstance(module, nn.Linear):
            with torch.no_grad():
                # Each layer adds to the residual stream twice; this keeps the sum's size that of one layer.
                module.weight.mul_((2 * depth) ** -0.5)
            # The corpus is small, so each document is seen many times: without dropout it would be learnt by heart.
            module.register_forward_hook(dropout_hook(recipe.dropout))
    return model


def dropout_hook(share: float) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def hook(module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, training=module.training)

    return hook


def new_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * done))


def batches(documents: list[Document], recipe: Recipe, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches without end; every epoch packs the documents in a new order."""
    rng = np.random.default_rng(recipe.seed)
    while True:
        inputs, labels = packed_rows(documents, rng.permutation(len(documents)), CONTEXT)
        inputs, labels = inputs.to(device), labels.to(device)
        if len(inputs) < recipe.rows:
            raise ValueError(f"the corpus fills {len(inputs)} rows, fewer than the {recipe.rows} of one step")
        for start in range(0, len(inputs) - recipe.rows + 1, recipe.rows):
            chosen = slice(start, start + recipe.rows)
            yield inputs[chosen].long(), labels[chosen].long()


LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_function(model: LlamaForCausalLM, device: torch.device) -> LossFunction:
    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return loss


def validation_loss(
    model: nn.Module, loss: LossFunction, rows: tuple[torch.Tensor, torch.Tensor], recipe: Recipe, device: torch.device
) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad():
        for inputs, labels in zip(*(torch.split(part, recipe.rows) for part in rows), strict=True):
            total += loss(inputs.to(device).long(), labels.to(device).long()).item() * len(inputs)
    model.train()
    return total / len(rows[0])


def train(
    model: LlamaForCausalLM, documents: list[Document], held_out: list[Document], recipe: Recipe, device: torch.device
) -> list[Point]:
    """Trains in place and leaves the model with the weights of its best validation loss."""
    model.to(device).train()
    optimizer, loss = new_optimizer(model, recipe, device), loss_function(model, device)
    # Validation runs without dropout and now and then a smaller batch: it is not worth compiling once more.
    training_loss = torch.compile(loss, dynamic=False) if device.type == "cuda" else loss
    rows = packed_rows(held_out, np.arange(len(held_out)), CONTEXT)
    history: list[Point] = []
    best: dict[str, torch.Tensor] = {}
    total, count, started = torch.zeros((), device=device), 0, time.monotonic()
    for step, (inputs, labels) in zip(range(recipe.steps), batches(documents, recipe, device), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe)
        value = training_loss(inputs, labels)
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        total, count = total + value.detach(), count + 1
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            point = Point(step + 1, total.item() / count, validation_loss(model, loss, rows, recipe, device))
            total, count = torch.zeros((), device=device), 0
            speed = (step + 1) * recipe.rows * CONTEXT / (time.monotonic() - started)
            losses = f"train {point.train:.3f}, validation {point.val:.3f}"
            print(f"step {point.step}: {losses}, {speed:.0f} tokens/s", flush=True)
            if all(point.val < earlier.val for earlier in history):
                best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            history.append(point)
    model.load_state_dict(best)
    return history


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.to(device="cpu", dtype=torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=[SPECIAL.index(EOS), SPECIAL.index(END)],
        pad_token_id=SPECIAL.index(PAD),
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    save_tokenizer(tokenizer, folder, CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder that corpus.py wrote")
    parser.add_argument("--output", type=Path, default=Path("tiny"), help="folder for the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--rows", type=int, default=Recipe.rows)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    recipe = Recipe(options.steps, options.rows, options.rate, dropout=options.dropout, seed=options.seed)

    tokenizer = train_tokenizer(load_texts(options.corpus / "train.jsonl.gz"))
    documents = load_documents(options.corpus / "train.jsonl.gz", tokenizer)
    held_out = load_documents(options.corpus / "val.jsonl.gz", tokenizer)
    tokens = sum(len(document.tokens) for document in documents)
    model = new_model(recipe)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters, {tokens / 1e6:.2f} million tokens", flush=True)
    history = train(model, documents, held_out, recipe, device)
    save(model, tokenizer, options.output)
    record = {
        "parameters": model.num_parameters(),
        "corpus_tokens": tokens,
        "held_out_tokens": sum(len(document.tokens) for document in held_out),
        "recipe": asdict(recipe),
        "history": [asdict(point) for point in history],
        "adapters": {},
    }
    (options.output / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
