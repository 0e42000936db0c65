"""What a trace of an executor says: how busy the device was, how long it waited between steps, and what a step cost the host."""

from __future__ import annotations

import gzip
import json
import math
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from penstock.clients.bench.measure import percentile
from penstock.clients.bench.workloads import Workload
from penstock.clients.errors import PenstockError

STEP = "penstock step"  # as `engine.profile` calls it
ON_DEVICE, LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
WARM = 15  # query tokens of the warm-up request

Interval = tuple[float, float]


def begin_after(work: Workload, repeats: int) -> int:
    """The query tokens after which a trace is to begin, for one more run after `repeats` of them: where all prompts are in, and a third
    of the rest; of a workload that only has prompts, a quarter of these."""
    rest = work.output_tokens - len(work.items)
    return WARM + repeats * (work.input_tokens + rest) + (work.input_tokens + rest // 3 if rest else work.input_tokens // 4)


def read_profile(path: Path) -> dict[str, Any]:
    """Seconds and shares of the traced time, from the first traced step's first work on the device to the last one's end. On a CPU, the
    device is the host. Raises `PenstockError` if there is no trace, or no step in it."""
    try:
        raw = path.read_bytes()
        trace = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, ValueError) as error:
        raise PenstockError(f"{path}: there is no trace that can be read: {error}") from error
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    hosts = sorted(_interval(event) for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    work = [event for event in events if event.get("cat") in ON_DEVICE]
    steps = _on_device(hosts, events, work) if work else hosts
    if not steps:
        raise PenstockError(f"{path}: no step was traced")
    begin, end = steps[0][0], max(last for _, last in steps)
    span = max(end - begin, 1e-9)
    gaps = [max(0.0, after[0] - before[1]) for before, after in pairwise(steps)]
    costs = [last - first for first, last in hosts]
    return {
        "file": str(path), "traced_steps": len(hosts), "traced_s": span / 1e6,
        "busy_share": _covered([_interval(event) for event in work] if work else hosts, begin, end) / span,
        "idle_between_share": sum(gaps) / span, "gap_p50_s": median(gaps) / 1e6 if gaps else None,
        "device_step_p50_s": median(last - first for first, last in steps) / 1e6,
        "host_step_p50_s": median(costs) / 1e6, "host_step_p99_s": (percentile(costs, 99) or 0.0) / 1e6,
    }  # fmt: skip


def _interval(event: dict[str, Any]) -> Interval:
    """Microseconds."""
    return float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))


def _correlation(event: dict[str, Any]) -> int | None:
    """What the launch of something has in common with it."""
    return event.get("args", {}).get("correlation")  # type: ignore[no-any-return]


def _on_device(hosts: list[Interval], events: list[dict[str, Any]], work: list[dict[str, Any]]) -> list[Interval]:
    """When the device ran each step: what was launched while the host was at it. Other threads launch nothing."""
    launched = {_correlation(event): float(event["ts"]) for event in events if event.get("cat") in LAUNCHES}
    launched.pop(None, None)
    begins = [begin for begin, _ in hosts]
    found: dict[int, Interval] = {}
    for event in work:
        at = launched.get(_correlation(event), -math.inf)
        step = bisect_right(begins, at) - 1
        if step >= 0 and at <= hosts[step][1]:
            first, last = _interval(event)
            before = found.get(step, (first, last))
            found[step] = min(first, before[0]), max(last, before[1])
    return [found[step] for step in sorted(found)]


def _covered(intervals: list[Interval], begin: float, end: float) -> float:
    """How much of the time from `begin` to `end` lies within any of them."""
    total, reached = 0.0, begin
    for first, last in sorted(intervals):
        first, last = max(first, reached), min(last, end)
        if last > first:
            total += last - first
            reached = last
    return total
