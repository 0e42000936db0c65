"""What may be drawn: penalties on logits, and the filters on scaled logits, which exclude a token by making it -inf.

All are functions of whole rows. A filter depends on a row's values only through a threshold: equal logits are kept or dropped together, so
neither the order of a sort nor the device decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine.history import IN_PROMPT

SHORTLISTS = (256, 4096)  # on a CPU, top-p looks at so many of the likeliest tokens before it sorts them all


def penalize(scores: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Repetition (Keskar et al., arXiv:1909.05858) over prompt and output; frequency and presence over the output, as OpenAI defines
    them. `scores`, `counts` `[n, vocab_size]`, `penalties` `[n, 3]`."""
    repetition, presence, frequency = penalties[:, 0:1], penalties[:, 1:2], penalties[:, 2:3]
    generated = counts & (IN_PROMPT - 1)
    repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores = torch.where(counts != 0, repeated, scores)
    return scores - frequency * generated - presence * (generated > 0)


def on_rows(scaled: Tensor, rows: Tensor, stage: Callable[[Tensor], Tensor]) -> None:
    if len(rows) == len(scaled):
        scaled.copy_(stage(scaled))
    else:
        scaled.index_copy_(0, rows, stage(scaled.index_select(0, rows)))


def top_k(scaled: Tensor, k: Tensor, most: int) -> Tensor:
    """Keep each row's k largest, and whatever equals the k-th."""
    least = scaled.topk(most, dim=-1).values.gather(1, k[:, None] - 1)
    return scaled.masked_fill(scaled < least, -math.inf)


def top_p(scaled: Tensor, p: Tensor) -> Tensor:
    """Keep the fewest tokens, likeliest first, that hold at least p of the probability, and whatever equals the last of them (Holtzman
    et al., arXiv:1904.09751). Summed in float64, so that the order of summing does not decide."""
    highest = scaled.amax(dim=-1, keepdim=True)
    share = p[:, None] * (scaled - highest).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
    # Where the host may look without waiting, sorting a few of the likeliest is nearly always enough.
    for most in SHORTLISTS if scaled.device.type == "cpu" else ():
        if most < scaled.shape[1]:
            likeliest = scaled.topk(most, dim=-1).values
            held = (likeliest - highest).exp_().cumsum(dim=-1, dtype=torch.float64)
            if bool((held[:, -1:] >= share).all()):
                return _cut(scaled, likeliest, held, share)
    ordered = scaled.sort(dim=-1, descending=True).values
    return _cut(scaled, ordered, (ordered - highest).exp_().cumsum(dim=-1, dtype=torch.float64), share)


def _cut(scaled: Tensor, ordered: Tensor, held: Tensor, share: Tensor) -> Tensor:
    last = (held < share).sum(dim=-1, keepdim=True).clamp_(max=ordered.shape[1] - 1)
    return scaled.masked_fill(scaled < ordered.gather(1, last), -math.inf)


def min_p(scaled: Tensor, log: Tensor) -> Tensor:
    """Keep tokens with at least min_p times the probability of the likeliest (Nguyen et al., arXiv:2407.01082)."""
    return scaled.masked_fill(scaled < scaled.amax(dim=-1, keepdim=True) + log[:, None], -math.inf)
