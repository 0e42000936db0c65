"""The seam between a model's products and the adapters of a step: what hangs on a product, and what a step tells a backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard

import numpy as np
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32
from penstock.engine.lora.layout import PageLayout, Place

if TYPE_CHECKING:
    from penstock.engine.lora.triton import TritonAdapters
    from penstock.engine.model.linear import Linear, LinearMethod

Pages = tuple[int, ...]  # of one adapter; a page is of one only. Empty: the base model


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedRows:
    """The rows of a step on the host, by what adapts them. `pages` are those of each row, `firsts` `[rows + 1]` where its tokens begin in
    the step's flat list; `samples` are the tokens that go on after the last layer's attention, None: all of them."""

    pages: Sequence[Pages]
    firsts: Int32
    samples: Int32 | None

    @property
    def row_of(self) -> Int32:
        """Of each token, which row it belongs to: `[tokens]`."""
        return np.repeat(np.arange(len(self.pages), dtype=np.int32), np.diff(self.firsts))

    def by_adapter(self) -> tuple[list[Pages], Int32]:
        """The adapters that are there, each once, and of each token which of them it has, -1 for none: `[tokens]`."""
        adapters = list(dict.fromkeys(pages for pages in self.pages if pages))
        numbers = {pages: number for number, pages in enumerate(adapters)}
        return adapters, np.array([numbers.get(pages, -1) for pages in self.pages], np.int32)[self.row_of]


class AdapterBackend(Protocol):
    """One way to add what adapters do, and the step that all products share: `prepare`, `begin` and `end` run once in a step that has
    adapted rows, `ahead` and `add` once a product."""

    active: bool  # between `begin` and `end`
    joins: bool  # see `can_join`

    def prepare(self, rows: AdaptedRows) -> Columns:
        """On the host: the columns that this backend needs on the device, whatever their names."""
        ...

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        """The columns have arrived: the step begins."""
        ...

    def end(self) -> None:
        """The model is done with the step."""
        ...

    def narrow(self) -> None:
        """From here on, to the end of the step, there are only the tokens of `samples`."""
        ...

    def ahead(self, place: Place, x: Tensor) -> None:
        """The product of x `[tokens, in]` comes next, and `add` after it: what needs x alone may begin."""
        ...

    def add(self, place: Place, x: Tensor, y: Tensor) -> None:
        """Add to y `[tokens, sum(outs)]`, in place, what their adapters make of x `[tokens, in]`."""
        ...


def can_join(backend: AdapterBackend) -> TypeGuard[TritonAdapters]:
    """Whether the kernel of a product may do the first half of what adapters add."""
    return backend.joins


class Adapted:
    """The adapters of a step, on one product: where its group lies in a page, and the backend that holds the step."""

    __slots__ = ("backend", "place")

    def __init__(self, place: Place, backend: AdapterBackend) -> None:
        self.place, self.backend = place, backend

    def multiply(self, method: LinearMethod, x: Tensor) -> Tensor:
        """What the product makes of x `[..., in]`, and what adapters add: `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        self.backend.ahead(self.place, rows)
        y = method(x)
        self.backend.add(self.place, rows, y.view(-1, y.shape[-1]))
        return y


def adapt(products: Iterable[Linear], layout: PageLayout, backend: AdapterBackend) -> None:
    """Hang a backend on the products that `layout` was made of."""
    adaptable = (product for product in products if product.group)
    for product, place in zip(adaptable, layout.places, strict=True):
        product.adapted = Adapted(place, backend)
