"""`penstock bench adapters --oversubscribed`: more adapters in use than fit on the device, so that they take turns on it.

Each adapter in use has one stream open, and asks for something else when that ends. A rehearsal has made all of them ready on this machine
before, so what is measured is how they share the pages, not how they are made ready. The prefix cache is on: a stream that gave way finds
its own keys there. No prompt comes twice.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
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
    async with engine_with(model, in_use, demand.ranks, pages, names=registered, **{"prefix_cache": True, **config}) as (client, names):
        vocab = client.model["vocab_size"]
        base_work, work = (adapted(in_use * (rounds + 1), demand.prompt, demand.output, some, vocab) for some in ([], names))
        base, _, _ = await _run(client, base_work, in_use)
        run, by_adapter, before = await _run(client, work, in_use)
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


async def _run(client: AsyncClient, work: Workload, at_once: int) -> tuple[Run, list[list[Trace]], dict[str, Any]]:
    """`at_once` streams, each of which asks for every so-many-th item, one after another, but for the first: those are the rehearsal.
    Returns also the traces by stream, and the report before."""

    async def ask(items: list[Item]) -> list[Trace]:
        return [await run_item(client, item) for item in items]

    await rehearse(client, replace(work, items=work.items[:at_once]))
    before = await settled(client)
    begun = time.perf_counter()
    by_stream = list(await asyncio.gather(*(ask(work.items[at_once + first :: at_once]) for first in range(at_once))))
    seconds, traces = time.perf_counter() - begun, [trace for traces in by_stream for trace in traces]
    return Run(seconds, sum(len(item.ids) for item in work.items[at_once:]), traces), by_stream, before
