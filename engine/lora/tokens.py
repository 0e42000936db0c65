"""Adapters on a CPU by a kernel of our own: each token with its adapter, whatever the others have, so that a mix costs what one does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns, Int32
from penstock.engine.kernels.cpu import AdaptedStep, Group, Kernels, Pool
from penstock.engine.lora.base import AdaptedRows
from penstock.engine.lora.layout import PagePool, Place


class TokenAdapters:
    """An `engine.lora.base.AdapterBackend` for float32. A token's bits depend on its own row alone."""

    joins = False

    def __init__(self, pool: PagePool, kernels: Kernels) -> None:
        self.pool, self.kernels, self.active = pool, kernels, False
        self._pool = Pool(pool.data.data_ptr(), pool.data.stride(0), pool.used.data_ptr(), pool.used.stride(0))
        self._groups = {place: _describe(place) for place in pool.layout.places}
        self._held: list[Int32] = []  # what the addresses of a step point to
        self._step = self._sampled = AdaptedStep()

    def prepare(self, rows: AdaptedRows) -> Columns:
        counts = np.array([len(pages) for pages in rows.pages], np.int32)
        firsts = np.cumsum(counts, dtype=np.int32) - counts
        pages = np.array([page for pages in rows.pages for page in pages], np.int32)
        row_of = rows.row_of
        self._held = [pages]
        self._step = self._sampled = self._point(firsts[row_of], counts[row_of], pages)
        if rows.samples is not None:
            row_of = row_of[rows.samples]
            self._sampled = self._point(firsts[row_of], counts[row_of], pages)
        return {}

    def _point(self, firsts: Int32, counts: Int32, pages: Int32) -> AdaptedStep:
        self._held += [firsts, counts]
        return AdaptedStep(firsts.ctypes.data, counts.ctypes.data, pages.ctypes.data, len(firsts), torch.get_num_threads())

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self.active = True

    def end(self) -> None:
        self.active = False

    def narrow(self) -> None:
        self._step = self._sampled

    def ahead(self, place: Place, x: Tensor) -> None:
        pass

    def add(self, place: Place, x: Tensor, y: Tensor) -> None:
        if len(x) != self._step.tokens:
            raise RuntimeError(f"{place.group[0].name} got {len(x)} tokens of a step that has {self._step.tokens}")
        self.kernels.adapt(self._pool, self._groups[place], self._step, x if x.stride(1) == 1 else x.contiguous(), y)


def _describe(place: Place) -> Group:
    slices = len(place.group)
    return Group(place.a, place.in_features, slices, place.site, (*place.b, *[0] * (3 - slices)), (*place.outs, *[0] * (3 - slices)))
