"""The adapters of a runner: their pages on the device, which of them each slot has, and the backend that adds them to products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32, StepRows
from penstock.engine.kernels.cpu import load_kernels
from penstock.engine.lora.base import AdaptedRows, AdapterBackend, Pages
from penstock.engine.lora.layout import PagePool, layout_of
from penstock.engine.lora.segments import SegmentAdapters
from penstock.engine.lora.tokens import TokenAdapters

if TYPE_CHECKING:
    from penstock.engine.model.base import Model


class Adapters:
    """`pages` pages for a model with `slots` streams."""

    def __init__(self, model: Model, slots: int, pages: int) -> None:
        self.layout = layout_of(product.group for product in model.products)
        self.pool = PagePool(self.layout, pages, model.dtype, model.device)
        self.backend = choose_backend(self.pool, deterministic=model.deterministic)
        self._of_slot: list[Pages] = [()] * slots
        self.wanted = False
        model.adapt(self.layout, self.backend)

    def check(self, pages: Sequence[int], data: Tensor, used: Tensor) -> None:
        """Raise `ValueError` if what is to be put into so many pages is not an adapter of this model."""
        expected = (len(pages), self.layout.elements), (len(pages), len(self.layout.sites))
        if (data.shape, used.shape) != expected or data.dtype != self.pool.data.dtype:
            raise ValueError(f"an adapter of {tuple(data.shape)} {data.dtype}, {tuple(used.shape)}: expected {expected}")

    def write(self, pages: Sequence[int], data: Tensor, used: Tensor) -> None:
        """Put an adapter, as `engine.lora.store.read_pages` gives it, into pages that no slot has. Raises `ValueError` if it is not one of
        this model."""
        self.check(pages, data, used)
        self.pool.write(pages, data, used)

    def facts(self) -> dict[str, Any]:
        """What others must know to make adapters ready for it: see `PageLayout`."""
        groups = [[[site.name, site.in_features, site.out_features] for site in place.group] for place in self.layout.places]
        return {"pages": len(self.pool.data), "dtype": str(self.pool.data.dtype).removeprefix("torch."), "groups": groups}

    def fill(self, slot: int, pages: Pages) -> None:
        """A slot gets a new occupant, with this adapter."""
        self._of_slot[slot] = pages

    def prepare(self, rows: StepRows, samples: Int32 | None) -> Columns:
        """The columns that the next step needs for its adapters, and whether they are `wanted` at all. `samples` are the tokens that go on
        after the last layer's attention, None: all of them."""
        mine = [self._of_slot[slot] for slot in rows.slots.tolist()]
        self.wanted = any(mine)
        return self.backend.prepare(AdaptedRows(mine, rows.firsts, samples)) if self.wanted else {}

    @contextmanager
    def step(self, columns: Mapping[str, Tensor]) -> Iterator[None]:
        """The model runs the step that was prepared last; its columns have arrived."""
        if self.wanted:
            self.backend.begin(columns)
        try:
            yield
        finally:
            self.backend.end()


def choose_backend(pool: PagePool, *, deterministic: bool) -> AdapterBackend:
    """Our own kernels: in Triton on CUDA, and on a CPU in float32, if they can be compiled; else torch. `deterministic`: a token's bits do
    not depend on the others of its step, but for torch's."""
    if pool.data.is_cuda:
        from penstock.engine.kernels.tiles import SMALL
        from penstock.engine.lora.triton import TritonAdapters  # Triton comes with CUDA builds of torch only

        return TritonAdapters(pool, rows=SMALL if deterministic else None)
    if pool.data.device.type == "cpu" and pool.data.dtype == torch.float32 and (kernels := load_kernels()) is not None:
        return TokenAdapters(pool, kernels)
    return SegmentAdapters(pool)
