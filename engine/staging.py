"""From the host to the device and back without waiting: all columns of a step in one transfer, the results on a stream of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.base import Columns

ALIGNMENT = 16  # bytes


class Staging(Protocol):
    """Takes a step's columns to the device."""

    def send(self, columns: Columns) -> dict[str, Tensor]:
        """int32 and bool columns arrive as int64, which is what torch wants of an index; others as they are. They may be used until as
        many further steps were sent as the staging was made for."""
        ...


def _widened(columns: Columns) -> Columns:
    return {name: column.astype(np.int64) if column.dtype.kind in "ib" else column for name, column in columns.items()}


class HostStaging:
    """For a CPU: the columns are the tensors."""

    def send(self, columns: Columns) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in _widened(columns).items()}


class PinnedStaging:
    """For CUDA: columns are packed into one pinned buffer and copied in one transfer. There is a buffer for each step in flight and one
    more; a buffer is written again only after the event of its last transfer."""

    def __init__(self, device: torch.device, steps: int, size: int = 1 << 20) -> None:
        self.device = device
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(steps)]
        self._events = [torch.cuda.Event() for _ in range(steps)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def send(self, columns: Columns) -> dict[str, Tensor]:
        arrays = _widened(columns)
        places: list[tuple[int, int]] = []
        end = 0
        for array in arrays.values():
            places.append((end, array.nbytes))
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        turn = self._turn = (self._turn + 1) % len(self._buffers)
        self._events[turn].synchronize()
        if self._buffers[turn].numel() < end:
            self._buffers[turn] = torch.empty(2 * end, dtype=torch.uint8, pin_memory=True)
        buffer = self._buffers[turn]
        packed = buffer.numpy()
        for array, (place, size) in zip(arrays.values(), places, strict=True):
            packed[place : place + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = torch.empty(end, dtype=torch.uint8, device=self.device)
        there.copy_(buffer[:end], non_blocking=True)
        self._events[turn].record()
        return {
            name: there[place : place + size].view(_torch_dtype(array)).view(array.shape)
            for (name, array), (place, size) in zip(arrays.items(), places, strict=True)
        }


def _torch_dtype(array: npt.NDArray[Any]) -> torch.dtype:
    return {"i8": torch.int64, "f4": torch.float32, "f8": torch.float64}[array.dtype.str[1:]]


class Returned(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> Mapping[str, Tensor]:
        """Block until they are there; the tensors are the caller's own."""
        ...


class Here:
    """For a CPU: they are there already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> Mapping[str, Tensor]:
        return self._tensors


class Copied:
    """For CUDA: copied to pinned memory on a side stream, so that the next step need not wait, nor the host for more than this step."""

    def __init__(self, tensors: Mapping[str, Tensor], stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        self._tensors = {}
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._tensors[name] = there.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
        self._event = stream.record_event()

    def wait(self) -> Mapping[str, Tensor]:
        self._event.synchronize()
        return self._tensors
