"""Adapters laid out in pages, matrix by matrix: the plain way, for tests that need them in memory and for those of the other way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.engine.lora.layout import RANKS, PageLayout, Weights


def lay_out(layout: PageLayout, weights: Weights, dtype: torch.dtype, scales: Mapping[str, float] | None = None) -> tuple[Tensor, Tensor]:
    """What `engine.lora.store.read_pages` gives of such an adapter; without `scales` B has its scale in it."""
    pages = max(-(-len(a) // RANKS) for a, _ in weights.values())
    data = torch.zeros((pages, layout.elements), dtype=dtype)
    used = torch.zeros((pages, len(layout.sites)), dtype=torch.int32)
    for place in layout.places:
        for number, site in enumerate(place.group):
            if site.name not in weights:
                continue
            a, b = weights[site.name]
            b = b if scales is None else b.float() * scales[site.name]
            for page, first in enumerate(range(0, len(a), RANKS)):
                rows, columns = a[first : first + RANKS], b.t()[first : first + RANKS]
                used[page, place.site + number] = len(rows)
                a_at, b_at = place.a + number * RANKS * site.in_features, place.b[number]
                data[page, a_at : a_at + rows.numel()] = rows.reshape(-1).to(dtype)
                data[page, b_at : b_at + columns.numel()] = columns.reshape(-1).to(dtype)
    return data, used
