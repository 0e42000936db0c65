"""The sizes of steps that CUDA graphs are captured for: a step is filled up to one of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

FINE = 11  # from 2 to this power on, sizes of mixed steps are a sixteenth apart
FEW_SAMPLES = 16  # of a step with chunks: logits of as many as there can be take time


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of a step: tiles of `rows` tokens (`engine.kernels.tiles`), and up to `pages` pages for each."""

    rows: int
    pages: int


@dataclass(frozen=True, slots=True)
class Size:
    """How much a graph has room for. Without `chunks` there is a decode for each token, and every token is sampled. Without a `mix` all
    tokens are the base model's, and adapters cost nothing. `prompt`: the chunk is one alone, a long prompt from its beginning."""

    tokens: int
    samples: int
    chunks: bool
    plain: bool
    mix: Mix | None = None
    prompt: bool = False


def samples_of(samples: int, tokens: int, slots: int) -> int:
    """Of a step with chunks: room for few, or for as many as there can be."""
    most = min(slots, tokens)
    return min(FEW_SAMPLES, most) if samples <= FEW_SAMPLES else most


def likely(rows: Sequence[int], tokens: Sequence[int], mixes: Iterable[Mix | None], longest: int | None) -> Iterator[Size]:
    """The sizes that steps are likely to need, for each mix the largest first: graphs share one memory, and what one leaves is used by
    another only if that needs no more. `longest`: so many tokens or more may be a prompt by itself; None: none is."""
    slots = rows[-1]
    for mix in mixes:
        decodes = [Size(count, count, chunks=False, plain=True, mix=mix) for count in reversed(rows)]
        mixed = [
            Size(count, samples_of(samples, count, slots), chunks=True, plain=True, mix=mix)
            for samples in (slots, 1)
            for count in reversed(tokens)
        ]
        prompts = [replace(size, prompt=True) for size in mixed[len(tokens) :] if longest is not None and size.tokens >= longest]
        yield from dict.fromkeys((mixed[0], *decodes, *mixed[1:], *prompts))


def beginnings(rows: Sequence[int], tokens: Sequence[int], mix: Mix) -> Iterator[Size]:
    """Sizes whose graphs have, between them, all kernels that those of a mix have: once they are captured, others need nothing compiled.
    Products of up to 8, 16 and 32 rows have kernels of their own (`engine.kernels.few_rows`)."""
    slots = rows[-1]
    yield Size(tokens[-1], samples_of(slots, tokens[-1], slots), chunks=True, plain=True, mix=mix)
    few = [rows[bisect_right(rows, most) - 1] for most in (32, 16, 8)]
    yield from (Size(count, count, chunks=False, plain=True, mix=mix) for count in dict.fromkeys((slots, *few)))


def coarse(most: int) -> list[int]:
    """Numbers of tokens that mixed steps are captured for: a third apart while they are few, an eighth and then a sixteenth from where
    their products take longer the more they are."""
    found = {most, *(size for power in range(4, 9) for size in (2**power, 3 * 2**power // 2))}
    for power in range(9, most.bit_length()):
        parts = 8 if power < FINE else 16
        found |= {2**power * part // parts for part in range(parts, 2 * parts)}
    return sorted(size for size in found if size <= most)


def close(most: int) -> list[int]:
    """Numbers of rows that steps of decodes are captured for: few enough to capture, and hardly a quarter more than a step has."""
    found, size = {most}, 1
    while size < most:
        found.add(size)
        size += max(1, 2 ** (size.bit_length() - 3))
    return sorted(found)
