"""Whether a stream that was disturbed equals the undisturbed one; and if it does not, how they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TIE = 1e-4  # scores this near may change places when a batch is grouped differently, in float32
_RUN = 4  # ids in a row that tell where in the undisturbed stream a disturbed one went on

SAME, TIED, LOST, REPEATED, DIVERGED = "same", "tied", "lost", "repeated", "diverged"


@dataclass(frozen=True, slots=True)
class Told:
    """What a client was told of one stream, in order. `logprobs` are those of its tokens, empty if they were not asked for; `error` is
    what it failed with."""

    ids: list[int]
    text: str
    reason: str | None
    logprobs: list[float]
    error: str | None = None


Score = Callable[[int, int, float], float]  # of (index in the stream, id, log-probability): what the sampler took the largest of


def judge(told: Told, undisturbed: Told, score: Score | None) -> str:
    """`told` against `undisturbed`: the same, or tied where they part (only with a `score`), or it lost ids, or repeated some, or went
    another way."""
    if told.error is not None:
        return LOST
    at = next((index for index, pair in enumerate(zip(told.ids, undisturbed.ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        if len(told.ids) != len(undisturbed.ids):
            return LOST if len(told.ids) < len(undisturbed.ids) else REPEATED
        return SAME if (told.text, told.reason) == (undisturbed.text, undisturbed.reason) else DIVERGED
    if score is not None and told.logprobs and undisturbed.logprobs:
        ours = score(at, told.ids[at], told.logprobs[at])
        if abs(ours - score(at, undisturbed.ids[at], undisturbed.logprobs[at])) < TIE:
            return TIED
    run = told.ids[at : at + _RUN]
    found = [index for index in range(len(undisturbed.ids) - len(run) + 1) if undisturbed.ids[index : index + len(run)] == run]
    if not found:
        return DIVERGED
    return LOST if min(found, key=lambda index: abs(index - at)) > at else REPEATED


def noisy_score(prompt_tokens: int, temperature: float, seed: int, vocab: int) -> Score:
    """The score of a token of a seeded stream: its log-probability over the temperature, with the noise of its place; of a greedy one
    the log-probability alone. Differs from the sampler's own by a constant at each place."""

    def score(index: int, token: int, logprob: float) -> float:
        if temperature == 0:
            return logprob
        import numpy as np
        import torch

        from penstock.engine.noise import gumbel, id_steps, noise_keys

        keys = noise_keys(np.array([seed], np.int64), np.array([prompt_tokens + index], np.int64))
        return logprob / temperature + float(gumbel(torch.from_numpy(keys), id_steps(vocab, torch.device("cpu")))[0, token])

    return score
