"""A gated feed-forward: down(activation(gate(x)) * up(x)), with gate and up as one product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from penstock.engine.model.linear import Linear
from penstock.engine.model.norm import Norm

if TYPE_CHECKING:
    from penstock.engine.model.glue import FusedGlue, Glue


class Mlp:
    """`gate_up` is `[2 * inner, hidden]`, the gate first; `down` `[hidden, inner]`."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, h: Tensor, y: Tensor, after: Norm | None, glue: Glue) -> tuple[Tensor, Tensor | None]:
        """See `engine.model.glue.Glue.end`, with the feed-forward of y in the place of a product."""
        return glue.end(self.down, h, glue.gate(self.gate_up(y)), after)

    @property
    def products(self) -> tuple[Linear, ...]:
        """Those that every row goes through."""
        return self.gate_up, self.down

    def run_fused(self, h: Tensor, norm: Norm | None, glue: FusedGlue) -> Tensor:
        """h `[rows, hidden]` plus the feed-forward of its norm."""
        return glue.product(self.down, glue.product(self.gate_up, h, norm=norm, gated=True), add=h)
