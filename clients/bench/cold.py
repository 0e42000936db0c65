"""`penstock bench adapters --cold`: adapters that nobody asked for before arrive while others decode. Does anyone wait for them?

The streams of adapters that are there run all the time. Then the cold ones are asked for, all at once or one after another, a short
request each: their files are no longer in memory, so they are read from the disk, checked, laid out and copied to the device. Once more
for the same, which are there by now, tells what of that is due to the requests themselves. As contexts grow all the time, and with them
every gap, what comes between is compared with what was before and with what comes after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.adapters import Demand, engine_with, make_resident
from penstock.clients.bench.lora import pages_of
from penstock.clients.bench.measure import Trace, percentile, run_item
from penstock.clients.bench.workloads import Item, adapted

LONGEST = 4096  # tokens of a resident stream before it begins anew
ARRIVING = (16, 2)  # ids in and tokens out of the request for a cold adapter
_EVERY_S = 0.01  # between looks whether all streams have begun


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time, and of what was asked for in it the seconds to the first tokens, the last of which is its end."""

    begin: float
    end: float
    firsts: list[float]


@dataclass(slots=True)
class Residents:
    """Streams that run all the time, and what was seen of them so far."""

    streams: int
    traces: list[Trace] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """All of them have begun."""
        return sum(trace.tokens > 0 for trace in self.traces) >= self.streams

    def gaps(self, window: Window) -> list[float]:
        """Seconds between tokens, of gaps that were open at any time of it. A chunk of k tokens is k gaps."""
        return [b - a for trace in self.traces for a, b in pairwise(trace.times()) if b > window.begin and a < window.end]


async def cold(
    model: str, resident: int, arrive: int, seconds: float, every: float, demand: Demand, **config: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """`arrive` cold adapters, one asked for `every` so many seconds, beside `resident` streams, each with another one that is there; before
    and after them `seconds` of those alone. `growth_p50` and `growth_p99`: by how much gaps between tokens are longer from the first ask to
    the last first token than in the mean of the two. Returns figures, and for a picture the gaps. Raises `InvalidRequest`."""
    made = resident + arrive
    async with engine_with(model, made, demand.ranks, sum(pages_of(demand.ranks, made)), flush=True, **config) as (client, names):
        await make_resident(client, names[:resident])
        vocab = client.model["vocab_size"]
        items = adapted(resident, demand.prompt, min(LONGEST, client.model["max_model_len"] - demand.prompt), names[:resident], vocab).items
        arrivals = adapted(arrive, *ARRIVING, names[resident:], vocab).items
        async with _running(client, items) as residents:
            await _rehearse(client, adapted(arrive, *ARRIVING, names[:resident], vocab).items)
            before = await _window(client, [], seconds, 0.0)
            arriving = await _window(client, arrivals, 0.0, every)
            after = await _window(client, [], seconds, 0.0)
            again = await _window(client, arrivals, 0.0, every)
        facts = client.model
    windows = {"before": before, "during": arriving, "after": after, "again": again}
    gaps = {name: residents.gaps(window) for name, window in windows.items()}
    between = {f"itl_{name}_p{percent}_s": percentile(found, percent) for name, found in gaps.items() for percent in (50, 99)}
    growth = {f"growth_p{at}": _growth(*[between[f"itl_{when}_p{at}_s"] for when in ("before", "during", "after")]) for at in (50, 99)}
    figures = {
        "workload": f"{arrive} cold adapters beside {resident} streams of {demand.prompt} ids", "model": model,
        "ranks": list(demand.ranks), "resident": resident, "arrive": arrive, "every_s": every, **between, **growth,
        "asked_to_first_p50_s": percentile(arriving.firsts, 50), "asked_to_first_max_s": max(arriving.firsts),
        "again_to_first_p50_s": percentile(again.firsts, 50), "again_to_first_max_s": max(again.firsts),
        "gaps": {name: len(found) for name, found in gaps.items()}, "engine": facts, "config": config,
    }  # fmt: skip
    return figures, gaps


@asynccontextmanager
async def _running(client: AsyncClient, items: list[Item]) -> AsyncIterator[Residents]:
    """Each item again and again. Entered once all have begun."""
    residents = Residents(len(items))

    async def repeat(item: Item) -> None:
        while True:
            residents.traces.append(Trace())
            await run_item(client, item, residents.traces[-1])

    tasks = [asyncio.ensure_future(repeat(item)) for item in items]
    try:
        while not residents.running:
            await _look(tasks)
        yield residents
        await _look(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _look(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Raises what one of them failed with."""
    done, _ = await asyncio.wait(tasks, timeout=_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _rehearse(client: AsyncClient, items: list[Item]) -> None:
    """As many as may begin in one step: on a GPU its graph is captured when one of its size comes the second time, and that is not to be
    measured."""
    count = 1
    while count < 2 * len(items):
        for _ in range(3):  # they need not all begin in one step
            await asyncio.gather(*(run_item(client, item) for item in items[:count]))
        count *= 2


async def _window(client: AsyncClient, items: list[Item], seconds: float, every: float) -> Window:
    async def ask(number: int, item: Item) -> Trace:
        await asyncio.sleep(number * every)
        return await run_item(client, item)

    begun = time.perf_counter()
    await asyncio.sleep(seconds)
    traces = await asyncio.gather(*(ask(number, item) for number, item in enumerate(items)))
    end = max((trace.sent + trace.first for trace in traces), default=time.perf_counter())
    return Window(begun, end, [trace.first for trace in traces])


def _growth(before: float | None, during: float | None, after: float | None) -> float | None:
    return 2 * during / (before + after) - 1 if before and during and after else None
