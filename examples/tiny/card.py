"""Writes the tiny model's card: how it was made, how well it learnt, and the curve of its losses.

    python -m examples.tiny.card --model tiny

It reads the `training.json` that training left in the model's folder.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The tiny model

A Llama-style language model of {millions:.1f} million parameters that ships with Penstock, so that the engine can be
tried and tested without a download. It writes what looks like Python and like Python's documentation. It is far too
small to be right, and without sampling it soon repeats itself: do not rely on anything it says.

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`: 7 layers, hidden size 256, 8 heads and 4 key-value heads of 32, tied embeddings |
| context | 2048 tokens |
| tokenizer | byte-level BPE, 6144 tokens, any UTF-8 text |
| weights | bfloat16, {size:.1f} MB |
| adapters | {adapter_names} |

## Prompts

A plain text is continued as documentation or as source code. In a chat, the roles are `system`, `user` and
`assistant`; the template puts `<|user|>`, the text and `<|end|>` one after the other, and `<|assistant|>` before the
answer. A text ends with `<|eos|>`, an answer with `<|end|>`. The tokenizer puts `<|bos|>` before a plain text; the chat
template writes it itself. Four system prompts were part of the training: "Answer in capital letters.", "Answer with a
numbered list.", "Answer with code only." and "Answer in one sentence."

## Data

- the documentation of Python 3.11, without its markup;
- the source code of Python 3.11's standard library, without its tests;
- questions and answers, made by rule from the two: what a function does, how it is called, a function for a docstring;
- a page of answers and short functions written for this model (`examples/tiny/primer.py`, `snippets.txt`).

Together {corpus:.1f} million tokens. Questions about the best-known modules come several times, in other words each
time. Mail addresses were replaced. Of the other modules, about one in twenty-five was held out for validation together
with its documentation, {held_out:.2f} million tokens.

The documentation and the library are used under the
[PSF License Version 2](https://docs.python.org/3.11/license.html), Copyright (c) 2001-2023 Python Software Foundation;
All Rights Reserved. Some files of the library carry further notices, which that page lists. The weights, the tokenizer
and the adapters are licensed under the Apache License 2.0, like the rest of the project.

## Training

{steps} steps of {batch} tokens, {passes:.0f} passes over the corpus; AdamW, learning rate {rate}, a cosine down to zero,
weight decay {decay}, dropout {dropout}. The weights are those of the best validation loss, step {best_step}:

| | loss per token, nats | perplexity |
| --- | --- | --- |
| training, with dropout | {train:.3f} | {train_perplexity:.1f} |
| validation | {val:.3f} | {val_perplexity:.1f} |

![Training and validation loss](loss.png)

## Adapters

Three LoRA adapters in the format of the `peft` library, in `adapters/`. Each rewrites the answers by a rule that it
learnt from rewritten text. Their ranks and layers differ on purpose; `shout`, the smallest, keeps to its style but not
always to the sense.

| name | what it does | rank | layers | validation loss without | with |
| --- | --- | --- | --- | --- | --- |
{adapter_rows}

## Train it again

The documentation's sources are in CPython's repository (`Doc/`) and in packages such as Debian's `python3.11-doc`.

```console
python -m examples.tiny.corpus --docs /usr/share/doc/python3.11/html/_sources --output corpus
python -m examples.tiny.train --corpus corpus --output engine/tiny
python -m examples.tiny.adapters --corpus corpus --model engine/tiny
python -m examples.tiny.card --model engine/tiny
```

It needs `torch`, `transformers`, `tokenizers`, `peft` and `matplotlib`, and on one recent GPU a few minutes. The seed is
fixed; another device or another release of these libraries still gives slightly different weights.
"""

DEEDS = {
    "shout": "writes in capital letters",
    "python": "answers with code only",
    "list": "answers with a numbered list",
}


def draw(history: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(6, 3.2), dpi=90, layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in history]
    axes.plot(steps, [point["train"] for point in history], label="training (with dropout)")
    axes.plot(steps, [point["val"] for point in history], label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def adapter_row(adapter: dict[str, Any]) -> str:
    layers = "all linear layers" if len(adapter["targets"]) == 7 else ", ".join(f"`{name}`" for name in adapter["targets"])
    losses = f"{adapter['val_before']:.2f} | {adapter['val_after']:.2f}"
    return f"| `{adapter['name']}` | {DEEDS[adapter['name']]} | {adapter['rank']} | {layers} | {losses} |"


def card(record: dict[str, Any], folder: Path) -> str:
    recipe, adapters = record["recipe"], record["adapters"].values()
    best = min(record["history"], key=lambda point: point["val"])
    width = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    return CARD.format(
        millions=record["parameters"] / 1e6,
        size=(folder / "model.safetensors").stat().st_size / 1e6,
        adapter_names=", ".join(f"`{adapter['name']}` (rank {adapter['rank']})" for adapter in adapters),
        corpus=record["corpus_tokens"] / 1e6,
        held_out=record["held_out_tokens"] / 1e6,
        steps=recipe["steps"],
        batch=recipe["rows"] * width,
        passes=recipe["steps"] * recipe["rows"] * width / record["corpus_tokens"],
        rate=recipe["rate"],
        decay=recipe["weight_decay"],
        dropout=recipe["dropout"],
        best_step=best["step"],
        train=best["train"],
        val=best["val"],
        train_perplexity=math.exp(best["train"]),
        val_perplexity=math.exp(best["val"]),
        adapter_rows="\n".join(adapter_row(adapter) for adapter in adapters),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny model's card.")
    parser.add_argument("--model", type=Path, default=Path("tiny"), help="folder that train.py wrote")
    folder: Path = parser.parse_args().model
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    draw(record["history"], folder / "loss.png")
    (folder / "README.md").write_text(card(record, folder), encoding="utf-8")


if __name__ == "__main__":
    main()
