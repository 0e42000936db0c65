"""Brings adapters from disk to the device beside the steps: a thread of its own, and on CUDA a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from penstock.engine.lora.adapters import Adapters
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.store import read_pages

Told = Callable[[str | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Put what is in the file `path` into `pages`, once `after` has come, and tell how it went: None, or an error."""

    path: str
    pages: Sequence[int]
    after: torch.cuda.Event | None
    told: Told


class AdapterLoader:
    """Carries out orders one after another. The steps that were launched before an order may still read its pages: the copy waits for
    them on the device, not here. `told` is called on the loader's thread."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters, self._device = adapters, adapters.pool.data.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._staged: Tensor | None = None  # pinned
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
        self._thread.start()

    def load(self, path: str, pages: Sequence[int], told: Told) -> None:
        after = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._orders.put(Order(path, pages, after, told))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self._carry_out(order)
                error = None
            except Exception as failure:  # noqa: BLE001  whatever it was, somebody waits to hear of it
                error = f"{type(failure).__name__}: {failure}"
                if isinstance(failure, AdapterError | ValueError):  # a file that is broken would be found again and again
                    Path(order.path).unlink(missing_ok=True)
            order.told(error)

    @torch.inference_mode()
    def _carry_out(self, order: Order) -> None:
        data, used = read_pages(Path(order.path))
        self._adapters.check(order.pages, data, used)
        pool = self._adapters.pool
        if self._stream is None:
            pool.write(order.pages, data, used)
            return
        if self._staged is None:
            self._staged = torch.empty(pool.layout.elements, dtype=pool.data.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            if order.after is not None:
                self._stream.wait_event(order.after)
            # Page by page through pinned memory: from anywhere else the driver would copy at half the speed, and hold up others.
            for at, page in enumerate(order.pages):
                self._staged.copy_(data[at])
                pool.write([page], self._staged[None], used[at : at + 1])
                self._stream.synchronize()
