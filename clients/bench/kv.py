"""`penstock bench kv`: how far keys and values in eight bits move a model's log-probabilities from those of its own dtype.

The passages are the model's own: texts of one engine, drawn at temperature 1 after a few openings, so that any model has them, of any
length, and their perplexity means something. Both engines tell the log-probabilities of their tokens, and go on from them greedily.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.offline import engine, settled
from penstock.clients.values import Completion

OPENINGS = (
    "The module defines the following functions and constants:\n\n",
    "def read_lines(path, encoding=None):\n",
    "A river begins in the mountains, where rain and melting snow",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "In the year 1851, the city was known above all for",
    "Changed in version 3.7: the argument may also be",
    "To bake a loaf of bread you need flour, water, salt and",
    "for name, value in sorted(table.items()):\n",
)
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine says of all passages, one after another: each token's log-probability, the likeliest id in its place, and the ids of
    the continuations."""

    logprobs: list[float]
    likeliest: list[int]
    greedy: list[list[int]]

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Self:
        rows = [row for whole in completions for row in whole.prompt_logprobs or () if row is not None]
        return cls([row.logprob for row in rows], [row.top[0][0] for row in rows], [whole.ids for whole in completions])

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))


async def kv(model: str, passages: int, length: int, output: int, **config: Any) -> dict[str, Any]:
    """`passages` texts of about `length` tokens, and `output` greedy tokens after each, through an engine with `kv_dtype` auto and one with
    fp8. `again` compares the first engine with itself, where requests come one by one: what grouping alone does. `model` as of
    `offline.engine`."""
    openings = [OPENINGS[number % len(OPENINGS)] for number in range(passages)]
    async with engine(model, **config, kv_dtype="auto") as (client, _):
        drawn = await asyncio.gather(
            *(client.generate(text, max_tokens=length, temperature=1.0, seed=seed, **PLAIN) for seed, text in enumerate(openings))
        )
        texts = [opening + whole.text for opening, whole in zip(openings, drawn, strict=True)]
        auto = Told.of(await asyncio.gather(*(_tell(client, text, output) for text in texts)))
        again = Told.of([await _tell(client, text, output) for text in texts])
        status, facts = await settled(client), client.model
    async with engine(model, **config, kv_dtype="fp8") as (client, _):
        fp8 = Told.of(await asyncio.gather(*(_tell(client, text, output) for text in texts)))
        status_fp8 = await settled(client)
    return {
        "model": model, "tokens": len(auto.logprobs), "passages": passages, "continuations_of": output,
        "perplexity_auto": auto.perplexity, "perplexity_fp8": fp8.perplexity, **compare(auto, fp8),
        **{f"{name}_again": value for name, value in compare(auto, again).items()},
        "kv_dtype_auto": status["model"]["kv_dtype"], "kv_dtype_fp8": status_fp8["model"]["kv_dtype"],
        "blocks_auto": status["scheduler"]["blocks_total"], "blocks_fp8": status_fp8["scheduler"]["blocks_total"],
        "engine": facts, "config": config,
    }  # fmt: skip


async def _tell(client: AsyncClient, text: str, output: int) -> Completion:
    return await client.generate(text, max_tokens=output, temperature=0.0, prompt_logprobs=1, **PLAIN)


def compare(one: Told, other: Told) -> dict[str, float]:
    """Differences of log-probabilities in nats; shares of passages' tokens of which both hold the same id the likeliest, of the
    continuations' tokens that are the same in the same place, and of continuations that are the same as a whole."""
    differences = [abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)]
    tokens = [a == b for pair in zip(one.greedy, other.greedy, strict=True) for a, b in zip(*pair, strict=True)]
    return {
        "difference_mean": sum(differences) / len(differences),
        "difference_max": max(differences),
        "likeliest_same": _share([a == b for a, b in zip(one.likeliest, other.likeliest, strict=True)]),
        "greedy_same": _share(tokens),
        "continuations_same": _share([a == b for a, b in zip(one.greedy, other.greedy, strict=True)]),
    }


def _share(same: Sequence[bool]) -> float:
    return sum(same) / len(same)
