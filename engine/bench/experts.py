"""A feed-forward made of experts: the router's product, the choice that it makes, and all that the experts do with the rows they get.

Which experts a token gets is random, and so how many of them a step touches at all: their weights are what it cannot but read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from penstock.engine.bench.case import Case, Subject
from penstock.engine.bench.clock import Call
from penstock.engine.bench.products import product_case
from penstock.engine.model.experts import Experts, Mixture, choose_experts
from penstock.engine.model.glue import PlainGlue


def time_experts(subject: Subject, rows: int) -> Iterator[Case]:
    mixture = subject.mixture
    if mixture is None:
        return
    logits = draw_logits(subject, rows, mixture)
    yield product_case(subject, "router", rows, subject.hidden, mixture.experts)
    yield _routing(subject, logits, mixture)
    yield _experts(subject, logits, mixture)


def draw_logits(subject: Subject, rows: int, mixture: Mixture) -> Tensor:
    """A router's logits `[rows, experts]`: those of a row are all different, so that whoever chooses chooses the same."""
    ranks = torch.rand(rows, mixture.experts, device=subject.device).argsort(-1)
    return ranks.to(subject.dtype) / 16  # whole numbers are exact in bfloat16 up to 256, and so are their sixteenths


def _routing(subject: Subject, logits: Tensor, mixture: Mixture) -> Case:
    """Weights and pairs in the order of their experts; on a CPU the weights and numbers of those that are chosen."""
    rows, pairs = len(logits), len(logits) * mixture.chosen
    if subject.fused:
        from penstock.engine.kernels.experts import rows_in_tile  # Triton comes with CUDA builds of torch only
        from penstock.engine.kernels.route import route_rows

        tile = rows_in_tile(pairs / mixture.experts, subject.dtype)
        call: Call = lambda: route_rows(logits, mixture, tile).weights  # noqa: E731
        moved = logits.nbytes + pairs * (4 + 4)
    else:
        call = lambda: choose_experts(logits, mixture)[0]  # noqa: E731
        moved = logits.nbytes + pairs * ((subject.dtype.itemsize if mixture.rounded else 4) + 8)
    return Case("routing", f"{mixture.chosen} of {mixture.experts}", rows, moved, 0, [call])


def _experts(subject: Subject, logits: Tensor, mixture: Mixture) -> Case:
    """From a router's logits to the sum of what the experts made: routing, gate and up, the gate, down, sum. Calls choose as many experts
    as each other, but others: where few are chosen, one layer's are enough for many calls."""
    rows, hidden, inner, item = len(logits), subject.hidden, mixture.inner, subject.dtype.itemsize
    touched, expert = touched_experts(logits, mixture), 3 * inner * hidden  # elements of one
    x, kind = subject.draw(rows, hidden), subject.decoder.activation

    def layer() -> Callable[[Tensor], Tensor]:
        gate_up = subject.draw(mixture.experts, 2 * inner, hidden, scale=hidden**-0.5)
        down = subject.draw(mixture.experts, hidden, inner, scale=inner**-0.5)
        if subject.fused:
            from penstock.engine.kernels.experts import mix_rows  # Triton comes with CUDA builds of torch only

            return lambda those: mix_rows(x, those, gate_up, down, mixture, kind)
        experts = Experts(subject.draw(mixture.experts, hidden), gate_up, down, mixture)
        return lambda those: experts.run_routed(x, those, PlainGlue((), kind, subject.dtype).gate)

    def others() -> Tensor:
        return logits.index_select(1, torch.randperm(mixture.experts, device=subject.device))

    layers, choices = subject.copies(layer, mixture.experts * expert * item), subject.copies(others, touched * expert * item)
    calls = [partial(mix, those) for mix, those in zip(cycle(layers), choices, strict=False)]
    name = f"{hidden} to {inner}, {touched} of {mixture.experts} read"
    moved = (touched * expert + logits.numel() + 2 * x.numel()) * item
    return Case("experts", name, rows, moved, 2 * rows * mixture.chosen * expert, calls)


def touched_experts(logits: Tensor, mixture: Mixture) -> int:
    """How many experts some row chooses."""
    return int(logits.topk(mixture.chosen).indices.flatten().bincount().count_nonzero())
