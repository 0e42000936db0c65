"""How long a call takes. On CUDA without the host: calls are recorded as a CUDA graph, as the engine runs them, and the graph is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

REPLAYS = 20  # of a graph: the median counts
CALLS, GRAPH_S = 200, 0.02  # of a graph: enough that its launch does not count, and no more than it takes to see that
FEWEST, CPU_S = 5, 0.1  # calls on a CPU, and the seconds after which there are no more

Call = Callable[[], Tensor]


@torch.inference_mode()
def time_calls(calls: Sequence[Call], device: torch.device) -> float:
    """Median seconds of a call. `calls` take turns: they do the same on different memory."""
    for call in calls:
        call()  # what must be compiled is
    return _on_cuda(calls, device) if device.type == "cuda" else _on_cpu(calls)


def _on_cuda(calls: Sequence[Call], device: torch.device) -> float:
    from penstock.engine.graphs import CudaRecord  # Triton comes with CUDA builds of torch only

    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    most = (time.perf_counter() - begun) / len(calls)  # with the host's part, so a graph may come out shorter than `GRAPH_S`
    rounds = -(-max(1, min(CALLS, int(GRAPH_S / most))) // len(calls))

    def run() -> Tensor:
        for call in list(calls) * rounds:
            out = call()
        return out

    # A record of its own for each graph: its memory goes with it.
    replay, _ = CudaRecord(device)(run)
    replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]  # type: ignore[no-untyped-call]
    for begin, end in marks:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize(device)
    milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in marks]
    return median(milliseconds) / 1e3 / (rounds * len(calls))


def _on_cpu(calls: Sequence[Call]) -> float:
    seconds: list[float] = []
    end = time.perf_counter() + CPU_S
    while len(seconds) < FEWEST or time.perf_counter() < end:
        call = calls[len(seconds) % len(calls)]
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return median(seconds)
