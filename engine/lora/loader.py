"""Brings adapters from host memory or disk to the device beside the steps: a thread of its own, and on CUDA a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from penstock.engine.lora.adapters import Adapters
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.host import HostPage, HostPages
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
    them on the device, not here. `told` is called on the loader's thread. `host`: what is asked for again may be there; None where the
    device's memory is the host's."""

    def __init__(self, adapters: Adapters, host: HostPages | None) -> None:
        self._adapters, self._device, self.host = adapters, adapters.pool.data.device, host
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
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
            if self.host is not None and error is None:
                self.host.prepare()

    @torch.inference_mode()
    def _carry_out(self, order: Order) -> None:
        if self.host is None:
            self._adapters.pool.write(order.pages, *self._read(order))
            return
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and order.after is not None:
                self._stream.wait_event(order.after)
            self._bring(order, self.host)

    def _bring(self, order: Order, host: HostPages) -> None:
        """By way of host memory: from anywhere else the driver would copy at half the speed, and hold up others."""
        content: tuple[Tensor, Tensor] | None = None
        for at, number in enumerate(order.pages):
            page = host.find((order.path, at))
            if page is not None:
                self._copy(page, number, None)
                continue
            if content is None:
                content = self._read(order)
            page = host.take()
            page.used = content[1][at].clone()
            self._copy(page, number, content[0][at])
            host.give((order.path, at), page)

    def _copy(self, page: HostPage, number: int, content: Tensor | None) -> None:
        """To the device, of what is in a page or what is to be in it: each piece goes while the next one is filled."""
        data, used = self._adapters.pool.data[number], self._adapters.pool.used[number]
        for at, piece in enumerate(page.pieces):
            part = data[at * len(piece) : (at + 1) * len(piece)]
            if content is not None:
                piece[: len(part)].copy_(content[at * len(piece) : (at + 1) * len(piece)])
            part.copy_(piece[: len(part)], non_blocking=True)
        if page.used is not None:
            used.copy_(page.used)
        if self._stream is not None:
            self._stream.synchronize()

    def _read(self, order: Order) -> tuple[Tensor, Tensor]:
        """All of a file's pages. Raises `AdapterError`, and `ValueError` if they are not what was ordered."""
        content = read_pages(Path(order.path))
        self._adapters.check(order.pages, *content)
        return content
