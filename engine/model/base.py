"""The seam between a runner and a model, however it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from penstock.engine.attention.base import AttentionBackend, KVPool, LayerShape
from penstock.engine.lora.base import AdapterBackend
from penstock.engine.lora.layout import PageLayout
from penstock.engine.model.linear import Linear


class Model(Protocol):
    """What a runner needs of a model."""

    layers: tuple[LayerShape, ...]
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    deterministic: bool  # whether a token's bits do not depend on what else is in the step, given attention of which that is true
    products: tuple[Linear, ...]  # those that every token of a step goes through, in its order, or every token that goes on

    def attach(self, pool: KVPool, backend: AttentionBackend) -> None:
        """Give each attention layer its part of the pool, and all of them the backend that holds the step."""
        ...

    def adapt(self, layout: PageLayout, backend: AdapterBackend) -> None:
        """Have adapters change `products`, which `layout` was made of."""
        ...

    def detach(self) -> None:
        """Let go of pool, backend and adapters."""
        ...

    def forward(self, ids: Tensor, positions: Tensor, rows: Tensor | None, *, keep: bool = False) -> Tensor:
        """One step. `ids` and `positions` int64 `[tokens]`; `rows` int64 `[n]`: the tokens whose logits are asked for, None: all of them.
        Returns logits `[n, vocab_size]` after all that the family does to them. `keep`: `more` will be called."""
        ...

    def more(self, rows: Tensor) -> Tensor:
        """Logits of other tokens of the last step, which was run with `keep`."""
        ...


def run_model(model: Model, last: Tensor, sent: Mapping[str, Tensor], *, keep: bool = False) -> Tensor:
    """The logits of a step whose columns are on the device. A token is that of `tokens`, or where that is below 0 the last of its slot."""
    ids = last.index_select(0, sent["sources"])
    if "tokens" in sent:
        ids = torch.where(sent["tokens"] < 0, ids, sent["tokens"])
    return model.forward(ids, sent["positions"], sent.get("sample_tokens"), keep=keep)
