"""Adapters in torch's operations, one adapter after another: for any device, and what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns
from penstock.engine.lora.base import AdaptedRows, Pages
from penstock.engine.lora.layout import PagePool, Place


class SegmentAdapters:
    """An `engine.lora.base.AdapterBackend`. The tokens of one adapter are a segment: an index column of the step."""

    joins = False

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.active = pool, False
        self._adapters: list[Pages] = []
        self._columns: Mapping[str, Tensor] = {}
        self._segments: list[tuple[Pages, Tensor]] = []

    def prepare(self, rows: AdaptedRows) -> Columns:
        self._adapters, of_tokens = rows.by_adapter()
        columns: Columns = {}
        for number in range(len(self._adapters)):
            columns[f"adapters.{number}"] = np.flatnonzero(of_tokens == number)
            if rows.samples is not None:
                columns[f"adapters.sampled.{number}"] = np.flatnonzero(of_tokens[rows.samples] == number)
        return columns

    def begin(self, columns: Mapping[str, Tensor]) -> None:
        self.active, self._columns = True, columns
        self._segments = [(pages, columns[f"adapters.{number}"]) for number, pages in enumerate(self._adapters)]

    def end(self) -> None:
        self.active = False

    def narrow(self) -> None:
        if self.active:
            self._segments = [(pages, self._columns[f"adapters.sampled.{number}"]) for number, pages in enumerate(self._adapters)]

    def ahead(self, place: Place, x: Tensor) -> None:
        pass

    def add(self, place: Place, x: Tensor, y: Tensor) -> None:
        for pages, tokens in self._segments:
            mine = x.index_select(0, tokens)
            for page in pages:
                parts = [(mine @ a.t()) @ b for a, b in self.pool.matrices(place, page)]
                y.index_add_(0, tokens, parts[0] if len(parts) == 1 else torch.cat(parts, 1))
