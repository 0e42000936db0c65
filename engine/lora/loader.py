"""Brings adapters from host memory or disk to the device beside the steps: a thread of its own, and on CUDA a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from penstock.engine.lora.adapters import Adapters
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.host import HostPage, HostPages
from penstock.engine.lora.store import PageFile, read_pages

READERS = 4  # threads: one reads what is in memory at a sixth of the speed of a device's bus

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
        self._readers = ThreadPoolExecutor(READERS, "adapter-reader")  # begins its threads when there is something to read
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
        self._thread.start()

    def load(self, path: str, pages: Sequence[int], told: Told) -> None:
        after = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._orders.put(Order(path, pages, after, told))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(timeout=5)
        self._readers.shutdown(wait=False)  # what is to be read is read: nobody hears of a future that is cancelled here

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self._carry_out(order)
                error = None
            except Exception as failure:  # noqa: BLE001  whatever it was, somebody waits to hear of it
                error = f"{type(failure).__name__}: {failure}"
                if _is_the_files(failure):  # it would be found again and again
                    with suppress(OSError):
                        Path(order.path).unlink()
            order.told(error)
            if self.host is not None and error is None:
                with suppress(RuntimeError):  # no memory for one more: whoever takes one hears of it
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
        with ExitStack() as stack:
            used: Tensor | None = None
            file: PageFile | None = None
            reading: list[Future[None]] = []
            for at, number in enumerate(order.pages):
                page = host.find((order.path, at))
                if page is not None:
                    self._copy(page, number, ())
                    continue
                if file is None or used is None:
                    file, used = stack.enter_context(closing(PageFile(Path(order.path)))), self._read(order)[1]
                    stack.callback(wait, reading)  # before it is closed: if one fails, the others still read
                page = host.take()
                page.used = used[at].clone()
                self._copy(page, number, self._fill(page, file, at, reading))
                host.give((order.path, at), page)

    def _fill(self, page: HostPage, file: PageFile, number: int, reading: list[Future[None]]) -> list[Future[None]]:
        """Read a page of a file to its pieces, each reader some that follow each other, which is added to `reading` at once. Returns which
        of them reads each piece."""
        size = self._adapters.layout.elements * self._adapters.pool.data.dtype.itemsize
        parts = [piece.view(torch.uint8).numpy() for piece in page.pieces]
        each, piece = -(-len(parts) // READERS), len(parts[0])
        parts[-1] = parts[-1][: size - (len(parts) - 1) * piece]
        first = len(reading)
        for at in range(0, len(parts), each):
            reading.append(self._readers.submit(file.read, parts[at : at + each], number * size + at * piece))
        return [reading[first + at // each] for at in range(len(parts))]

    def _copy(self, page: HostPage, number: int, filled: Sequence[Future[None]]) -> None:
        """To the device, of what is in a page, or will be as soon as its pieces are `filled`."""
        data, used = self._adapters.pool.data[number], self._adapters.pool.used[number]
        for at, piece in enumerate(page.pieces):
            if filled:
                filled[at].result()
            part = data[at * len(piece) : (at + 1) * len(piece)]
            part.copy_(piece[: len(part)], non_blocking=True)
        if page.used is not None:
            used.copy_(page.used)
        if self._stream is not None:
            self._stream.synchronize()

    def _read(self, order: Order) -> tuple[Tensor, Tensor]:
        """All of a file's pages. Raises `AdapterError`, `OSError`, and `ValueError` if they are not what was ordered."""
        content = read_pages(Path(order.path))
        self._adapters.check(order.pages, *content)
        return content


def _is_the_files(failure: Exception) -> bool:
    """Whether it is the fault of what is in a file."""
    return isinstance(failure, ValueError) or (isinstance(failure, AdapterError) and failure.code == "broken_adapter")
