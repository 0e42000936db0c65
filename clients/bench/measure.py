"""Running a workload through a client, and what was seen of it."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.workloads import Item, Workload


@dataclass(slots=True)
class Trace:
    """One request: when it was sent, on the clock of its run; seconds from there to its first token, and between tokens; tokens and
    chunks."""

    sent: float = 0.0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    chunks: int = 0

    def times(self) -> list[float]:
        """When each token came, on the clock of its run."""
        first = self.sent + self.first
        return [first] * (self.tokens - len(self.gaps)) + [first + since for since in accumulate(self.gaps)]


@dataclass(frozen=True, slots=True)
class Run:
    """A workload, run: wall time in seconds, and a trace of each request."""

    seconds: float
    input_tokens: int
    traces: list[Trace]

    @property
    def prefill_seconds(self) -> float:
        """From the first request sent to the last first token."""
        return max(trace.sent + trace.first for trace in self.traces) - min(trace.sent for trace in self.traces)

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return sum(trace.tokens for trace in self.traces) / self.seconds

    def figures(self) -> dict[str, Any]:
        """The figures that every bench prints. `prefill_tokens_per_s` are the input tokens over the time from the first request sent to
        the last first token: apart from what is decoded after that, though not from what is decoded meanwhile."""
        output = sum(trace.tokens for trace in self.traces)
        chunks = sum(trace.chunks for trace in self.traces)
        firsts = [trace.first for trace in self.traces]
        gaps = [gap for trace in self.traces for gap in trace.gaps]
        return {
            "output_tokens_per_s": self.rate,
            "input_tokens_per_s": self.input_tokens / self.seconds,
            "prefill_tokens_per_s": self.input_tokens / self.prefill_seconds,
            "seconds": self.seconds,
            "requests": len(self.traces),
            "input_tokens": self.input_tokens,
            "output_tokens": output,
            "ttft_p50_s": percentile(firsts, 50),
            "ttft_p99_s": percentile(firsts, 99),
            "itl_p50_s": percentile(gaps, 50),
            "itl_p99_s": percentile(gaps, 99),
            "tokens_per_chunk": output / chunks if chunks else 0.0,
        }


def percentile(values: list[float], percent: float) -> float | None:
    """Nearest rank; none of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def run_item(client: AsyncClient, item: Item, trace: Trace | None = None) -> Trace:
    """One request, read chunk by chunk. A chunk of k tokens counts as k gaps of a k-th of its own. `trace` is for who must know what came
    before the request was cancelled."""
    begun = before = time.perf_counter()
    trace = trace or Trace()
    trace.sent = begun
    params = {"max_tokens": item.max_tokens, "temperature": item.temperature, "ignore_eos": True, "seed": 0}
    stream = client.stream(item.ids, adapter=item.adapter, **params)
    async for chunk in stream:
        now, count = time.perf_counter(), len(chunk.ids)
        if not count:
            continue
        trace.chunks += 1
        if trace.tokens == 0:
            trace.first = now - begun
        else:
            trace.gaps += [(now - before) / count] * count
        trace.tokens += count
        before = now
    return trace


async def run_workload(client: AsyncClient, workload: Workload) -> Run:
    """All at once, or as many at a time as the workload says."""
    limit = asyncio.Semaphore(workload.at_once or len(workload.items))

    async def one(item: Item) -> Trace:
        async with limit:
            return await run_item(client, item)

    begun = time.perf_counter()
    traces = await asyncio.gather(*(one(item) for item in workload.items))
    return Run(time.perf_counter() - begun, workload.input_tokens, list(traces))


async def run_poisson(client: AsyncClient, items: list[Item], rate: float) -> Run:
    """Requests arrive by themselves, `rate` a second on average, whether or not earlier ones are done."""
    draw = random.Random(0)
    begun = time.perf_counter()
    tasks, due = [], 0.0
    for item in items:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(run_item(client, item)))
    traces = await asyncio.gather(*tasks)
    return Run(time.perf_counter() - begun, sum(len(item.ids) for item in items), list(traces))
