"""The Triton kernels of a feed-forward made of experts against float64, on fresh random inputs, and its plain form too."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.engine.model.decoder import ACTIVATIONS
from penstock.engine.model.experts import Experts, Mixture
from penstock.engine.model.glue import PlainGlue

from .interpreted import DEVICE, GPU, apart, assert_passes, here

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


def chosen_of(logits: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Weights in float64 and numbers of the experts that are to be chosen, of equal ones the first."""
    choices = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, : mixture.chosen]
    weights = logits.double().softmax(-1).gather(1, choices)
    return weights / weights.sum(-1, keepdim=True) if mixture.renormalized else weights, choices


@here
@pytest.mark.parametrize("renormalized", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "chosen", "rows"), [(1, 8, 2, 16), (5, 128, 8, 16), (133, 6, 2, 32), (150, 20, 4, 64)])
def test_every_pair_is_in_one_tile_of_its_expert(tokens: int, experts: int, chosen: int, rows: int, renormalized: bool) -> None:
    from penstock.engine.kernels.route import route_rows

    mixture = Mixture(experts, chosen, inner=1, renormalized=renormalized, rounded=False)
    logits = (torch.randn(tokens, experts) * 2).half().float()
    logits[0] = 0.5  # all alike: then the first of them
    logits[:, experts - 2] -= 100.0  # nobody's
    weights, choices = chosen_of(logits, mixture)
    routes = route_rows(logits.to(DEVICE), mixture, rows)
    torch.testing.assert_close(routes.weights.double().cpu(), weights, atol=1e-6, rtol=1e-5)
    order = routes.order.cpu().long()
    assert torch.equal(order, choices.flatten().argsort(stable=True))
    tiles = routes.tiles[: int(routes.count)].tolist()
    sizes = choices.flatten().bincount(minlength=experts).tolist()
    ends = [sum(sizes[: expert + 1]) for expert in range(experts)]
    expected = [[expert, at, ends[expert]] for expert in range(experts) for at in range(ends[expert] - sizes[expert], ends[expert], rows)]
    assert tiles == expected


@here
def test_a_row_of_nothing_but_nan_chooses_experts_that_there_are() -> None:
    from penstock.engine.kernels.route import route_rows

    logits = torch.randn(4, 6)
    logits[1] = float("nan")
    logits[3, 1:] = float("-inf")
    routes = route_rows(logits.to(DEVICE), Mixture(6, 3, inner=1, renormalized=True, rounded=False), 16)
    tiles = routes.tiles[: int(routes.count)]
    assert ((tiles[:, 0] >= 0) & (tiles[:, 0] < 6)).all()
    assert torch.equal(routes.order.sort().values.cpu(), torch.arange(12, dtype=torch.int32))
    assert routes.weights[3].tolist() == [1.0, 0.0, 0.0]


@dataclass(frozen=True, slots=True)
class Step:
    """Random tokens and experts, and what the experts are to make of the tokens."""

    x: Tensor
    logits: Tensor
    gate_up: Tensor
    down: Tensor
    expected: Tensor


def make_step(tokens: int, mixture: Mixture, hidden: int, activation: str, dtype: torch.dtype, logits: Tensor | None = None) -> Step:
    """`logits` are the first numbers of each token, if they are given."""
    x = torch.randn(tokens, 2 * hidden).to(dtype)[:, :hidden]
    if logits is None:
        logits = torch.randn(tokens, mixture.experts).to(dtype)
    else:
        x[:, : mixture.experts] = logits = logits.to(dtype)
    gate_up = (torch.randn(mixture.experts, 2 * mixture.inner, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(mixture.experts, hidden, mixture.inner) / mixture.inner**0.5).to(dtype)
    weights, choices = chosen_of(logits, mixture)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for expert in range(mixture.experts):
        gate, up = (x.double() @ gate_up[expert].double().t()).chunk(2, -1)
        share = (weights * (choices == expert)).sum(-1, keepdim=True)
        expected += share * ((ACTIVATIONS[activation](gate) * up) @ down[expert].double().t())
    return Step(x, logits, gate_up, down, expected)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "mixture", "hidden", "activation", "add"),
    [
        (1, Mixture(8, 2, inner=48, renormalized=True, rounded=False), 64, "silu", True),
        (2, Mixture(128, 8, inner=24, renormalized=True, rounded=True), 80, "silu", False),
        (9, Mixture(3, 3, inner=70, renormalized=False, rounded=True), 200, "gelu", True),
        (40, Mixture(5, 1, inner=96, renormalized=False, rounded=True), 64, "silu", False),
        (50, Mixture(4, 2, inner=130, renormalized=True, rounded=False), 136, "gelu_pytorch_tanh", False),
        (140, Mixture(2, 2, inner=64, renormalized=False, rounded=True), 140, "silu", True),
    ],
    ids=str,
)
def test_what_experts_make_of_a_step_is_exact(
    tokens: int, mixture: Mixture, hidden: int, activation: str, add: bool, dtype: torch.dtype
) -> None:
    from penstock.engine.kernels.experts import mix_rows

    step, stream = make_step(tokens, mixture, hidden, activation, dtype), torch.randn(tokens, hidden).to(dtype)
    given = [one.to(DEVICE) for one in (step.x, step.logits, step.gate_up, step.down)]
    got = [mix_rows(*given, mixture, activation, stream.to(DEVICE) if add else None) for _ in range(2)]
    assert torch.equal(*got), "a step gives different numbers each time"
    expected = step.expected + stream.double() if add else step.expected
    torch.testing.assert_close(got[0].double().cpu(), expected, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_the_plain_form_is_exact(tokens: int, dtype: torch.dtype) -> None:
    mixture = Mixture(12, 3, inner=48, renormalized=True, rounded=True)
    # Each token's logits are all different, and come out of the router as they went in.
    ranks = torch.rand(tokens, 12).argsort(-1) / 4
    step = make_step(tokens, mixture, 64, "silu", dtype, ranks)
    experts = Experts(torch.eye(12, 64).to(dtype), step.gate_up, step.down, mixture)
    got = experts.run_plain(step.x, PlainGlue([], "silu", dtype).gate)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), step.expected, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])


@here
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 40), (64, 40), (64, 8)])
def test_a_launch_has_room_for_any_routing(tokens: int, experts: int) -> None:
    """Its size depends on the number of tokens alone, so that it can be recorded once and run with others."""
    from penstock.engine.kernels.route import route_rows

    mixture = Mixture(experts, 2, inner=1, renormalized=True, rounded=False)
    even = torch.zeros(tokens, experts)
    even[torch.arange(tokens), torch.arange(tokens) % experts] = 1.0
    uneven = torch.zeros(tokens, experts)
    for rows in (16, 128):
        found = [route_rows(logits.to(DEVICE), mixture, rows) for logits in (even, uneven)]
        assert len({len(routes.tiles) for routes in found}) == 1
        assert all(int(routes.count) <= len(routes.tiles) for routes in found)
        assert len(found[0].tiles) <= 2 * tokens // rows + min(experts, 2 * tokens)
