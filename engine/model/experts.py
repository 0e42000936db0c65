"""A feed-forward made of experts: a router chooses a few of them for each token, and its weights sum what they give (Shazeer et al.,
arXiv:1701.06538; as in Mixtral, arXiv:2401.04088, each is a gated feed-forward)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.engine.model.linear import Dense, Linear, LinearMethod, Packed, can_pack
from penstock.engine.model.norm import Norm

if TYPE_CHECKING:
    from penstock.engine.model.glue import FusedGlue, Glue


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a config says of the experts of a layer. `renormalized`: the weights of those that were chosen sum to 1. `rounded`: weights
    have the model's dtype; else they stay float32."""

    experts: int
    chosen: int  # for each token
    inner: int  # width of an expert
    renormalized: bool
    rounded: bool


class Experts:
    """`router` is `[experts, hidden]`; `gate_up` `[experts, 2 * inner, hidden]`, the gate first; `down` `[experts, hidden, inner]`.

    On a CPU each expert's weights are packed, as those of a `Linear` are, and the stacks are not kept.
    """

    __slots__ = ("each", "mixture", "router", "stacks")

    def __init__(self, router: Tensor, gate_up: Tensor, down: Tensor, mixture: Mixture) -> None:
        self.mixture, self.router = mixture, Linear(router, None)
        packs = can_pack(gate_up)
        method = Packed if packs else Dense
        self.each: list[tuple[LinearMethod, LinearMethod]] = [
            (method(first, None), method(second, None)) for first, second in zip(gate_up, down, strict=True)
        ]
        self.stacks = None if packs else (gate_up, down)

    def __call__(self, h: Tensor, y: Tensor, after: Norm | None, glue: Glue) -> tuple[Tensor, Tensor | None]:
        """See `engine.model.glue.Glue.end`, with the feed-forward of y in the place of a product."""
        return (glue.mix(self, y, h), None) if after is None else (h, glue.mix(self, y))

    @property
    def products(self) -> tuple[Linear, ...]:
        """Those that every row goes through, but for the router's, which is by itself with few rows too."""
        return ()

    def run_fused(self, h: Tensor, norm: Norm | None, glue: FusedGlue) -> Tensor:
        """h `[rows, hidden]` plus what the experts make of its norm."""
        return glue.mix(self, glue.join(h, None, None, norm)[1], h)

    def run_plain(self, x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """In torch's operations: x `[tokens, hidden]` to the same shape; `gate` is between the two products of each expert."""
        return self.run_routed(x, self.router(x), gate)

    def run_routed(self, x: Tensor, logits: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """The same after the router: rows of x, sorted by expert, go through one expert after the other. Sums over a token's experts are
        always in order of their weights."""
        weights, chosen = choose_experts(logits, self.mixture)
        tokens, count = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.mixture.experts).tolist()
        rows, pairs = x.index_select(0, order // count).split_with_sizes(counts), order.split_with_sizes(counts)
        outs = torch.empty((tokens * count, x.shape[1]), dtype=x.dtype, device=x.device)
        for (first, second), part, at in zip(self.each, rows, pairs, strict=True):
            if len(at):
                outs[at] = second(gate(first(part)))
        return (outs.view(tokens, count, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)


def choose_experts(logits: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """By a router's logits `[tokens, experts]` the weights and the numbers of the experts that are chosen, both `[tokens, chosen]`."""
    weights, chosen = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(mixture.chosen, dim=-1)
    if mixture.renormalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype) if mixture.rounded else weights, chosen
