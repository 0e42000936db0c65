"""Where the weights of LoRA adapters lie: in pages of `RANKS` ranks each, for all products of the model at once.

An adapter changes a product `y = x @ weight.T` to `y + (x @ A.T) @ B`, A `[rank, in]`, B `[rank, out]` with the scale in it. A page holds
`RANKS` rows of A and of B of every product; an adapter of a higher rank has several pages, and what it does is the sum of what each of
them does. So adapters of any ranks lie beside each other without a largest rank, a load is a copy of whole pages, and products that
share their input (queries, keys and values) are one *group* whose rows of A lie one after another:

    page   A of group 0 [slices * RANKS, in] · B of its first slice [RANKS, out] · B of its second · … · A of group 1 · …

The same rank rows in pages are S-LoRA's unified paging (Sheng et al., MLSys 2024), with one page for all layers instead of one a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RANKS = 16  # rank rows in a page: what a tensor core's tile has
ALIGNMENT = 64  # elements that each matrix begins at a multiple of
TOGETHER = 4  # sites that are laid out at a time: a few megabytes, for which memory is used again and again


@dataclass(frozen=True, slots=True)
class Site:
    """A product of the model that adapters may change: the module `name` of transformers' `ForCausalLM`, such as
    `model.layers.0.self_attn.q_proj`: `y = x @ weight.T`, weight `[out_features, in_features]`."""

    name: str
    in_features: int
    out_features: int


Group = tuple[Site, ...]  # products of one input, in the order in which their outputs lie


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group lies in a page, in elements: `a` is the first of A, `b` those of each slice's B. `site` is the number of its first
    site among all."""

    group: Group
    site: int
    a: int
    b: tuple[int, ...]

    @property
    def in_features(self) -> int:
        return self.group[0].in_features

    @property
    def outs(self) -> tuple[int, ...]:
        return tuple(site.out_features for site in self.group)


Weights = Mapping[str, tuple[Tensor, Tensor]]  # A `[rank, in]` and B `[out, rank]`, by the names of sites, whose ranks may differ

Bytes = npt.NDArray[np.uint8]


class PageLayout:
    """The layout of a model's pages, of `elements` elements each. `digest` is equal where layouts are."""

    __slots__ = ("digest", "elements", "places", "sites")

    def __init__(self, groups: Sequence[Group]) -> None:
        self.sites = tuple(site for group in groups for site in group)
        places, end = [], 0

        def take(elements: int) -> int:
            nonlocal end
            first = end
            end += -(-elements // ALIGNMENT) * ALIGNMENT
            return first

        site = 0
        for group in groups:
            a = take(len(group) * RANKS * group[0].in_features)
            places.append(Place(group, site, a, tuple(take(RANKS * part.out_features) for part in group)))
            site += len(group)
        self.places, self.elements = tuple(places), end
        self.digest = blake2b(repr((RANKS, ALIGNMENT, groups)).encode(), digest_size=16).hexdigest()

    def used(self, weights: Weights) -> Tensor:
        """How many rank rows each site has in each page, int32 `[pages, sites]`."""
        ranks = torch.tensor([len(weights[site.name][0]) if site.name in weights else 0 for site in self.sites], dtype=torch.int32)
        firsts = torch.arange(0, int(ranks.max()), RANKS, dtype=torch.int32)
        return (ranks - firsts[:, None]).clamp(0, RANKS)

    def pieces(self, weights: Weights, scales: Mapping[str, float], dtype: torch.dtype) -> Iterator[tuple[int, int, Bytes]]:
        """What an adapter has in its pages `[pages, elements]`, which are zero elsewhere: in which page, from which of its bytes on, and
        rows of A or B `[rows, bytes]`, contiguous. `scales` are those of B, by the names of sites; it is scaled in float32.

        Some sites that are alike at a time: each of torch's operations gives up Python's lock and asks for it again, and where other
        threads prepare adapters, too, that takes longer than what a small one does."""
        alike: dict[tuple[object, ...], list[tuple[str, int, int]]] = {}
        for place in self.places:
            for number, site in enumerate(place.group):
                if site.name in weights:
                    a, b = weights[site.name]
                    key = a.shape, a.dtype, b.shape, b.dtype, scales[site.name]
                    alike.setdefault(key, []).append((site.name, place.a + number * RANKS * site.in_features, place.b[number]))
        for found in alike.values():
            for low in range(0, len(found), TOGETHER):
                some = found[low : low + TOGETHER]
                rows = torch.stack([weights[name][0] for name, _, _ in some]).to(dtype)
                columns = torch.stack([weights[name][1] for name, _, _ in some])
                columns = (columns.float() * scales[some[0][0]]).to(dtype).transpose(1, 2).contiguous()
                sides = rows.view(torch.uint8).numpy(), columns.view(torch.uint8).numpy()
                for number, (_, *firsts) in enumerate(some):
                    for side, first in zip(sides, firsts, strict=True):
                        for page, rank in enumerate(range(0, side.shape[1], RANKS)):
                            yield page, first * dtype.itemsize, side[number, rank : rank + RANKS]


def layout_of(groups: Iterable[Group]) -> PageLayout:
    """The layout of products, of which some have no sites."""
    return PageLayout([group for group in groups if group])


def layout_from(groups: Iterable[Iterable[tuple[str, int, int]]]) -> PageLayout:
    """The layout whose sites have these names and sizes, as another process told them."""
    return PageLayout([tuple(Site(*site) for site in group) for group in groups])


class PagePool:
    """Pages of adapters on the device: `data` `[pages, elements]`, `used` int32 `[pages, sites]` beside it and on the host."""

    def __init__(self, layout: PageLayout, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.data = torch.empty((pages, layout.elements), dtype=dtype, device=device)  # what nobody wrote, nobody reads
        self.used = torch.zeros((pages, len(layout.sites)), dtype=torch.int32, device=device)

    def write(self, pages: Sequence[int], data: Tensor, used: Tensor) -> None:
        """Put an adapter into these pages; nobody may be using them."""
        for page, content, rows in zip(pages, data, used, strict=True):
            if self.data.is_cpu:
                # torch would copy with threads of OpenMP's for whoever calls, and with more of them than cores those of the model's thread
                # no longer wait for each other awake: each of its steps takes a quarter longer from then on.
                self.data[page].view(torch.uint8).numpy()[:] = content.contiguous().view(torch.uint8).numpy()
            else:
                self.data[page].copy_(content)
            self.used[page].copy_(rows)

    def matrices(self, place: Place, page: int) -> list[tuple[Tensor, Tensor]]:
        """A `[RANKS, in]` and B `[RANKS, out]` of each slice of a group, in one page; views."""
        row, found = self.data[page], []
        for number, site in enumerate(place.group):
            a, b = place.a + number * RANKS * site.in_features, place.b[number]
            found.append(
                (
                    row[a : a + RANKS * site.in_features].view(RANKS, -1),
                    row[b : b + RANKS * site.out_features].view(RANKS, -1),
                )
            )
        return found
