"""The same workload through transformers alone, in a process of its own: what there was before.

    python -m penstock.clients.bench.against SHAPE WORKLOAD      (prints one JSON object)

Static batching pads on the left and runs each batch until its longest request is done; only tokens that were asked for count. A
batch of 1 is timed on 8 of the prompts. `generate_batch` is transformers' own continuous batching, 128 tokens for each prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from penstock.clients.bench.shapes import write_model
from penstock.clients.bench.workloads import Item, find


def static(model: Any, items: list[Item], batch: int) -> float:
    """Useful tokens a second with static batches."""
    import torch

    begun = time.perf_counter()
    for low in range(0, len(items), batch):
        part = items[low : low + batch]
        width = max(len(item.ids) for item in part)
        ids = torch.tensor([[0] * (width - len(item.ids)) + item.ids for item in part])
        mask = torch.tensor([[0] * (width - len(item.ids)) + [1] * len(item.ids) for item in part])
        longest = max(item.max_tokens for item in part)
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0
        )
    return sum(item.max_tokens for item in items) / (time.perf_counter() - begun)


def continuous(model: Any, items: list[Item]) -> float:
    """Tokens a second of `generate_batch`."""
    from transformers import GenerationConfig

    try:
        model.set_attn_implementation("paged|sdpa")
    except (ValueError, ImportError):  # newer releases know their paged attention by the plain name
        model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    begun = time.perf_counter()
    results = model.generate_batch(inputs=[item.ids for item in items], generation_config=config, progress_bar=False)
    failed = [result.error for result in results.values() if result.error]
    if failed:
        raise RuntimeError(f"generate_batch failed on {len(failed)} of {len(items)} prompts: {failed[0]}")
    return sum(len(result.generated_tokens) for result in results.values()) / (time.perf_counter() - begun)


def main() -> None:
    shape, workload = sys.argv[1:3]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    # Not inference_mode: generate_batch writes to its tensors from a thread of its own, which that would forbid.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        config = AutoConfig.from_pretrained(write_model(shape, Path(folder)))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        items = find(workload)(config.vocab_size).items
        static(model, items[:2], 2)  # warm up
        figures = {"static_1": static(model, items[:8], 1)}
        if workload != "cpu1":
            figures |= {"static_16": static(model, items, 16), "static_64": static(model, items, 64)}
            figures["generate_batch"] = continuous(model, items)
    print(json.dumps(figures), flush=True)  # noqa: T201  the line is the interface


if __name__ == "__main__":
    main()
