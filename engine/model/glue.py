"""What stands between the products of a decoder: norms, sums, rotary embedding, attention, activation. In torch's operations, or fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from penstock.engine.attention.base import LayerAttention
from penstock.engine.lora.base import AdapterBackend, can_join
from penstock.engine.model import invariant
from penstock.engine.model.decoder import ACTIVATIONS
from penstock.engine.model.experts import Experts
from penstock.engine.model.linear import Linear
from penstock.engine.model.norm import HeadNorm, Norm, WidthNorm
from penstock.engine.model.rotary import Rotary, rotate

if TYPE_CHECKING:
    from penstock.engine.attention.triton import TritonAttention


class Glue(Protocol):
    """`begin` runs once a step, the rest in each layer."""

    def begin(self, positions: Tensor) -> None:
        """A step of tokens at these positions, int64 `[tokens]`."""
        ...

    def join(self, h: Tensor, x: Tensor | None, after: Norm | None, before: Norm | None) -> tuple[Tensor, Tensor]:
        """A sublayer's output x joins h, both `[tokens, hidden]`: the sum, with `after` applied to x, and `before` applied to the sum. The
        second may be the first, whose memory `end` may change."""
        ...

    def end(self, product: Linear, h: Tensor, x: Tensor, after: Norm | None) -> tuple[Tensor, Tensor | None]:
        """The end of a sublayer: h `[tokens, hidden]` and the product of x `[tokens, in]`, which is to join it by way of `after`. Returns h
        and what `join` has still to add; or both summed, in the memory of h, and None."""
        ...

    def attend(
        self, layer: LayerAttention, qkv: Tensor, norm: HeadNorm | WidthNorm | None, rotary: Rotary, rows: Tensor | None
    ) -> Tensor:  # fmt: skip
        """From `[tokens, (heads + 2 * kv_heads) * dim]` to `[tokens, heads * dim]`; keys and values go to the pool. With `rows`, the
        step's `sample_tokens`, what those alone attend to: `[rows, heads * dim]`."""
        ...

    def gate(self, x: Tensor) -> Tensor:
        """The activation of the first half of x `[tokens, 2 * width]` times the other half."""
        ...

    def mix(self, experts: Experts, x: Tensor, add: Tensor | None = None) -> Tensor:
        """What the experts that the router chooses for each token of x `[tokens, hidden]` make of it, summed by its weights; with `add`
        `[tokens, hidden]`, plus that."""
        ...


class PlainGlue:
    """In torch's operations, for any device and any backend of attention."""

    def __init__(self, rotaries: Sequence[Rotary], activation: str, dtype: torch.dtype, *, deterministic: bool = False) -> None:
        self.rotaries, self.dtype = tuple(dict.fromkeys(rotaries)), dtype
        self.activation = (invariant.ACTIVATIONS if deterministic else ACTIVATIONS)[activation]
        self.turns: dict[Rotary, tuple[Tensor, Tensor]] = {}

    def begin(self, positions: Tensor) -> None:
        self.turns = {rotary: rotary.at(positions, self.dtype) for rotary in self.rotaries}

    def join(self, h: Tensor, x: Tensor | None, after: Norm | None, before: Norm | None) -> tuple[Tensor, Tensor]:
        if x is not None:
            h = h + (x if after is None else after(x))
        return h, h if before is None else before(h)

    def end(self, product: Linear, h: Tensor, x: Tensor, after: Norm | None) -> tuple[Tensor, Tensor | None]:
        return h, product(x)

    def attend(
        self, layer: LayerAttention, qkv: Tensor, norm: HeadNorm | WidthNorm | None, rotary: Rotary, rows: Tensor | None
    ) -> Tensor:  # fmt: skip
        shape = layer.shape
        rotated = shape.heads + shape.kv_heads
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        turning = heads[:, :rotated] if norm is None else norm(heads[:, :rotated])
        turned = rotate(turning, *self.turns[rotary])
        y = layer.backend.attend(layer, turned[:, : shape.heads], turned[:, shape.heads :], heads[:, rotated:], None).flatten(1)
        return y if rows is None else y.index_select(0, rows)

    def gate(self, x: Tensor) -> Tensor:
        width = x.shape[1] // 2
        return self.activation(x[:, :width]) * x[:, width:]

    def mix(self, experts: Experts, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = experts.run_plain(x, self.gate)
        return y if add is None else add + y


class FusedGlue:
    """In one Triton kernel each, with what `backend` holds of the step."""

    def __init__(self, rotaries: Sequence[Rotary], activation: str, backend: TritonAttention) -> None:
        from penstock.engine.kernels import experts, few_rows, gate, residual  # Triton comes with CUDA builds of torch only

        self._join, self._gate, self._mix = residual.join_rows, gate.gate_rows, experts.mix_rows
        self._few, self.suits_few, self.most_rows = few_rows.multiply_few, few_rows.suits_few, few_rows.most_rows
        self.activation, self.backend = activation, backend
        self.tables = {rotary: rotary.tables(backend.longest) for rotary in dict.fromkeys(rotaries)}
        self.positions = backend.table

    def begin(self, positions: Tensor) -> None:
        self.positions = positions

    def join(self, h: Tensor, x: Tensor | None, after: Norm | None, before: Norm | None) -> tuple[Tensor, Tensor]:
        norm = before or after
        epsilon = 0.0 if norm is None else norm.epsilon
        return self._join(h, x, None if after is None else after.weight, None if before is None else before.weight, epsilon)

    def end(self, product: Linear, h: Tensor, x: Tensor, after: Norm | None) -> tuple[Tensor, Tensor | None]:
        return (product.add(h, x), None) if after is None and product.adds else (h, product(x))

    def attend(
        self, layer: LayerAttention, qkv: Tensor, norm: HeadNorm | WidthNorm | None, rotary: Rotary, rows: Tensor | None
    ) -> Tensor:  # fmt: skip
        shape = layer.shape
        weight, epsilon = None, 0.0
        if isinstance(norm, HeadNorm):
            weight, epsilon = norm.weight, norm.epsilon
        elif norm is not None:
            rotated = (shape.heads + shape.kv_heads) * shape.head_dim
            turning = norm(qkv[:, :rotated].view(len(qkv), -1, shape.head_dim))
            qkv = torch.cat((turning.flatten(1), qkv[:, rotated:]), 1)
        return self.backend.attend_fused(layer, qkv, weight, epsilon, *self.tables[rotary], self.positions, rows).flatten(1)

    def gate(self, x: Tensor) -> Tensor:
        return self._gate(x, self.activation)

    def fuses(self, adapters: AdapterBackend | None) -> bool:
        """Whether the products of a step of few rows take along what is around them: `product`."""
        return adapters is None or not adapters.active or (can_join(adapters) and adapters.suits_few)

    def product(self, product: Linear, x: Tensor, *, norm: Norm | None = None, add: Tensor | None = None, gated: bool = False) -> Tensor:
        """A product of x `[rows, in]`, by way of `norm`; and then plus `add`, or gated. What adapters add is in it."""
        adapted, weight, bias = product.adapted, product.weight, product.bias
        if adapted is None or not adapted.backend.active or not can_join(adapted.backend):
            return self._few(x, weight, bias, norm=norm, add=add, activation=self.activation if gated else None)
        y = self._few(x, weight, bias, norm=norm, add=add, shrink=adapted.backend.fused(adapted.place, x))
        adapted.backend.finish(adapted.place, y)
        return self.gate(y) if gated else y

    def mix(self, experts: Experts, x: Tensor, add: Tensor | None = None) -> Tensor:
        if experts.stacks is None:
            y = experts.run_plain(x, self.gate)
            return y if add is None else add + y
        return self._mix(x, experts.router(x), *experts.stacks, experts.mixture, self.activation, add)
