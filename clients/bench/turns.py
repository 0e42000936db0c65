"""`penstock bench adapters --oversubscribed`: more adapters in use than fit on the device, so that they take turns on it.

Each adapter in use has one stream open, and asks again when that ends. A rehearsal has made all of them ready on this machine before, so
what is measured is how they share the pages, not how they are made ready.
"""

from __future__ import annotations

import asyncio
import time
from itertools import chain
from statistics import median_low
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.adapters import Demand, counted, engine_with, loads_between, rehearse
from penstock.clients.bench.lora import pages_of
from penstock.clients.bench.measure import Run, Trace, percentile, run_item
from penstock.clients.bench.offline import settled
from penstock.clients.bench.workloads import Item, Workload, adapted
from penstock.clients.order import refuse


async def oversubscribed(
    model: str, registered: int, in_use: int, pool: int, rounds: int, demand: Demand, **config: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """`in_use` adapters of `registered`, with the pages that `pool` of them take, and `rounds` requests for each. `ratio` is to the same
    requests without adapters. Returns figures, and for a picture the times to first tokens. Raises `InvalidRequest`."""
    if in_use > registered:
        raise refuse("in_use", in_use, f"at most as many as are registered, {registered}")
    pages = sum(pages_of(demand.ranks, pool))
    async with engine_with(model, in_use, demand.ranks, pages, names=registered, **config) as (client, names):
        base_work, work = (adapted(in_use, demand.prompt, demand.output, some, client.model["vocab_size"]) for some in ([], names))
        await rehearse(client, base_work)
        base, _ = await _run(client, base_work, rounds)
        await rehearse(client, work)
        before = await settled(client)
        run, by_adapter = await _run(client, work, rounds)
        after = await settled(client)
        facts = client.model
    times = [[when for trace in traces for when in trace.times()] for traces in by_adapter]
    half = median_low(chain.from_iterable(times))
    served = [sum(when <= half for when in mine) for mine in times]
    firsts = [trace.first for trace in run.traces]
    figures = {
        "workload": f"oversubscribed, {demand.prompt} ids in, {demand.output} tokens out", "model": model, "ranks": list(demand.ranks),
        "registered": registered, "in_use": in_use, "pool": pool, "pages": pages, "rounds": rounds, **run.figures(),
        "ttft_p90_s": percentile(firsts, 90), "ttft_max_s": max(firsts), "base_tokens_per_s": base.rate, "ratio": run.rate / base.rate,
        "loads": loads_between(before, after), "pages_from_host_memory": counted(before, after, "executor", "host_hits"),
        **shares(served), "engine": facts, "config": config,
    }  # fmt: skip
    return figures, {"with adapters": firsts, "without": [trace.first for trace in base.traces]}


def shares(served: list[int]) -> dict[str, float]:
    """How evenly tokens were spread when half of all were there: Jain's fairness index (1: all alike, 1/n: one got everything; Jain, Chiu
    and Hawe, 1984), and the least and the most that one got, as a multiple of the mean."""
    mean = sum(served) / len(served)
    index = sum(served) ** 2 / (len(served) * sum(tokens**2 for tokens in served))
    return {"jain_index": index, "share_min": min(served) / mean, "share_max": max(served) / mean}


async def _run(client: AsyncClient, work: Workload, rounds: int) -> tuple[Run, list[list[Trace]]]:
    """Each item `rounds` times, one after another; the traces also by item."""

    async def repeat(item: Item) -> list[Trace]:
        return [await run_item(client, item) for _ in range(rounds)]

    begun = time.perf_counter()
    by_item = list(await asyncio.gather(*(repeat(item) for item in work.items)))
    seconds, traces = time.perf_counter() - begun, [trace for traces in by_item for trace in traces]
    return Run(seconds, rounds * work.input_tokens, traces), by_item
