"""Pages of adapters in page-locked host memory, from where a device takes them at the speed of its bus: between those on the device and
the files of those that are ready.

A page is kept that is asked for the second time. If there is no room it takes the place of the one that was asked for longest ago, but
only if it was asked for more often: so adapters that take turns on the device, more of them than fit here, do not drive each other out
(TinyLFU's admission; Einziger, Friedman and Manes, 2017). Counts age: they are halved now and then.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 4 * 2**20  # bytes that are locked at once: it holds up whoever launches kernels meanwhile
AGE = 16  # times as many uses as pages fit, after which they count half

Key = tuple[str, int]  # file, and which of its pages


@dataclass(slots=True, eq=False)
class HostPage:
    """`pieces` are the page's elements, one after another; the last may be longer than what is left of them. `used` int32 `[sites]`, see
    `engine.lora.layout`."""

    pieces: list[Tensor]
    used: Tensor | None = None


class HostPages:
    """Pages of `elements` elements, in `limit` bytes and those of one page more, through which everything goes."""

    def __init__(self, elements: int, dtype: torch.dtype, limit: int, *, pinned: bool) -> None:
        self.piece = PIECE // dtype.itemsize
        self.count = -(-elements // self.piece)  # pieces of a page
        self.most = limit // (self.count * PIECE)
        self.hits = self.misses = 0
        self._dtype, self._pinned = dtype, pinned
        self._kept: OrderedDict[Key, HostPage] = OrderedDict()  # the one that was asked for last is last
        self._free: list[HostPage] = []
        self._uses: dict[Key, int] = {}
        self._used = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Key) -> HostPage | None:
        """Somebody asks for a page; it may be here."""
        self._count(key)
        page = self._kept.get(key)
        if page is None:
            self.misses += 1
        else:
            self.hits += 1
            self._kept.move_to_end(key)
        return page

    def take(self) -> HostPage:
        """One to be filled, and then given back. Raises `RuntimeError` if no memory can be had for the first."""
        try:
            self.prepare()
        except RuntimeError:
            if not self._kept:
                raise
            self._free.append(self._kept.popitem(last=False)[1])
        return self._free.pop()

    def give(self, key: Key, page: HostPage) -> None:
        """It holds this now: it is kept or is free again."""
        uses = self._uses.get(key, 0)
        if uses > 1 and self._make_room(uses):
            self._kept[key] = page
        else:
            self._free.append(page)

    def prepare(self) -> None:
        """Have a free one: to lock memory takes as long as to fill it."""
        if not self._free:
            self._free.append(HostPage([torch.empty(self.piece, dtype=self._dtype, pin_memory=self._pinned) for _ in range(self.count)]))

    def _make_room(self, uses: int) -> bool:
        if len(self._kept) < self.most:
            return True
        oldest = next(iter(self._kept), None)
        if oldest is None or self._uses.get(oldest, 0) >= uses:
            return False
        self._free.append(self._kept.pop(oldest))
        return True

    def _count(self, key: Key) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        self._used += 1
        if self._used >= AGE * max(1, self.most):
            self._used = 0
            self._uses = {key: uses // 2 for key, uses in self._uses.items() if uses > 1}
