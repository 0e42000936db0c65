"""Whether a stream that was disturbed equals the undisturbed one; and if it does not, how they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TIE = 1e-4  # scores this near may change places when a batch is grouped differently, in float32
_RUN = 4  # ids in a row that tell where in the undisturbed stream a disturbed one went on
_FAR = 16  # ids that may be lost or repeated in one place, and that must then be the same for certain

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


def judge(told: Told, undisturbed: Told, score: Score | None, *, exact: bool = True) -> str:
    """`told` against `undisturbed`: the same, or tied where they part (only with a `score`), or it lost ids, or repeated some, or went
    another way. Not `exact`: in a coarser dtype than float32 a stream may part wherever a batch is grouped differently, and then meet
    phrases of the undisturbed one again; so it lost or repeated ids if their number is wrong, or if all that follows is the same, moved."""
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
    if not exact:
        return _moved(told.ids, undisturbed.ids, at)
    run = told.ids[at : at + _RUN]
    found = [index for index in range(len(undisturbed.ids) - len(run) + 1) if undisturbed.ids[index : index + len(run)] == run]
    if not found:
        return DIVERGED
    return LOST if min(found, key=lambda index: abs(index - at)) > at else REPEATED


def _moved(ids: list[int], undisturbed: list[int], at: int) -> str:
    if len(ids) != len(undisturbed):
        return LOST if len(ids) < len(undisturbed) else REPEATED
    for by in range(1, _FAR + 1):
        for verdict, ours, theirs in ((LOST, ids[at:], undisturbed[at + by :]), (REPEATED, ids[at + by :], undisturbed[at:])):
            length = min(len(ours), len(theirs))
            if length >= _FAR and ours[:length] == theirs[:length] and not _circles(ours[:length]):
                return verdict
    return DIVERGED


def _circles(ids: list[int]) -> bool:
    """Whether the end repeats itself, as greedy streams of random weights do: two of them may meet in the same circle."""
    half = ids[len(ids) // 2 :]
    return any(half[by:] == half[:-by] for by in range(1, len(half) - 3))


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
