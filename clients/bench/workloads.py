"""What is run: each workload is a list of items, the same on every machine, so that figures can be compared.

Prompts are random ids and end-of-sequence is ignored, so that random weights of a real configuration give valid speed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One request: prompt ids, tokens to generate, temperature, and the name of an adapter."""

    ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """`at_once` is how many items are open at a time; none: all of them."""

    name: str
    items: list[Item]
    at_once: int | None = None

    @property
    def input_tokens(self) -> int:
        return sum(len(item.ids) for item in self.items)

    @property
    def output_tokens(self) -> int:
        return sum(item.max_tokens for item in self.items)


def mixed256(vocab: int) -> Workload:
    """The field's common offline workload: 256 prompts of 100-1,024 ids, 100-1,024 tokens each, temperature 0.6, all at once."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, min(10_000, vocab - 1)) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    return Workload("mixed256", [Item(ids, draw.randint(100, 1024), 0.6) for ids in prompts])


def decode(streams: int, vocab: int) -> Workload:
    """`streams` prompts of 512 ids, 128 tokens each, greedy."""
    draw = random.Random(0)
    return Workload(f"decode_b{streams}", [Item([draw.randrange(vocab) for _ in range(512)], 128) for _ in range(streams)])


def adapted(requests: int, prompt: int, output: int, adapters: Sequence[str], vocab: int) -> Workload:
    """`requests` prompts of `prompt` ids, `output` tokens each, greedy, all at once; request i uses adapter i mod k of k, none of none."""
    draw = random.Random(0)
    names = adapters or (None,)
    items = [Item([draw.randrange(vocab) for _ in range(prompt)], output, adapter=names[i % len(names)]) for i in range(requests)]
    return Workload(f"{requests} requests, {len(adapters)} adapters", items)


def prefill(vocab: int) -> Workload:
    """8 prompts of 8,192 ids, 1 token each."""
    draw = random.Random(0)
    return Workload("prefill", [Item([draw.randrange(vocab) for _ in range(8192)], 1) for _ in range(8)])


def cpu64(vocab: int) -> Workload:
    """64 prompts of 16-256 ids, 16-256 tokens each, greedy."""
    draw = random.Random(0)
    prompts = [[draw.randrange(vocab) for _ in range(draw.randint(16, 256))] for _ in range(64)]
    return Workload("cpu64", [Item(ids, draw.randint(16, 256)) for ids in prompts])


def cpu1(vocab: int) -> Workload:
    """8 of cpu64's prompts, one after another."""
    return Workload("cpu1", cpu64(vocab).items[:8], at_once=1)


def find(name: str) -> Callable[[int], Workload]:
    """The workload of this name, as a function of the vocabulary's size. Raises `KeyError`."""
    fixed: dict[str, Callable[[int], Workload]] = {"mixed256": mixed256, "prefill": prefill, "cpu64": cpu64, "cpu1": cpu1}
    if name.startswith("decode_b") and name.removeprefix("decode_b").isdecimal():
        streams = int(name.removeprefix("decode_b"))
        return lambda vocab: decode(streams, vocab)
    return fixed[name]
