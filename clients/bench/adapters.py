"""`penstock bench adapters`: what requests with adapters cost beside the same requests without, by how many adapters share a batch.

All adapters are on the device before what is measured begins, unless the engine was given fewer pages than they take. The numbers of
adapters take turns on one engine, again and again, so that a machine that is busy now and then disturbs all of them alike.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.lora import config_of, pages_of, write_adapters
from penstock.clients.bench.measure import Run, run_item, run_workload
from penstock.clients.bench.offline import engine, prepared, settled, step_figures
from penstock.clients.bench.workloads import Item, Workload, adapted
from penstock.clients.order import refuse

REHEARSED = 8  # tokens
ADAPTED_COLUMNS = {
    "adapters": ("adapters", "{:d}"), "requests": ("requests", "{:d}"), "output_tokens_per_s": ("tok/s", "{:,.0f}"),
    "ratio": ("ratio", "{:.3f}"), "ttft_p50_s": ("first token p50, s", "{:.3f}"), "ttft_p99_s": ("p99", "{:.3f}"),
    "itl_p50_s": ("between p50, s", "{:.4f}"), "itl_p99_s": ("p99", "{:.4f}"), "pages": ("pages", "{:d}"), "loads": ("loads", "{:d}"),
}  # fmt: skip
ONE_COLUMNS = {
    "prompt": ("ids in", "{:d}"), "output": ("tokens out", "{:d}"), "base_tokens_per_s": ("no adapter, tok/s", "{:,.0f}"),
    "output_tokens_per_s": ("one adapter, tok/s", "{:,.0f}"), "ratio": ("ratio", "{:.3f}"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for: `requests` of `prompt` ids, `output` tokens each; adapters are of these `ranks` in turn."""

    requests: int
    prompt: int
    output: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """So many adapters for so many requests: no fewer requests than adapters, else some would not be in use."""

    adapters: int
    requests: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A run, and what scheduler and executor counted in it; `loads`: adapters that were brought to the device meanwhile."""

    run: Run
    steps: dict[str, Any]
    loads: int


def read_counts(text: str) -> list[int]:
    """Numbers of adapters. Raises `InvalidRequest`."""
    parts = [part.strip() for part in text.split(",")]
    counts = [int(part) for part in parts if part.isdecimal()]
    if len(counts) != len(parts) or not any(counts):
        raise refuse("counts", text, "integers separated by commas, one of them above 0, such as 0,1,8")
    return list(dict.fromkeys(counts))


@asynccontextmanager
async def engine_with(
    model: str, made: int, ranks: Sequence[int], pages: int, *, names: int = 0, flush: bool = False, **config: Any
) -> AsyncIterator[tuple[AsyncClient, list[str]]]:
    """An engine with `pages` pages, and the names of `made` random adapters that it knows. If it is to know more `names`, those beyond
    stand for the same folders: nobody asks for them. What it makes of adapters is gone afterwards, too. `model` as of `config_of`."""
    with tempfile.TemporaryDirectory(prefix="penstock-adapters-") as folder:
        adapters = write_adapters(config_of(model), Path(folder), made, ranks, flush=flush)
        known = {f"lora-{number}": adapters[number % made] for number in range(max(made, names))}
        config = {"prefix_cache": False, "adapter_pages": pages, "adapter_cache": f"{folder}/ready", **config}
        async with engine(model, **config, adapters=tuple(f"{name}={path}" for name, path in known.items())) as (client, _):
            yield client, list(known)[:made]


async def adapters(
    model: str, counts: list[int], demand: Demand, repeats: int, *, one_stream: bool = True, **config: Any
) -> dict[str, Any]:
    """A row for each number of adapters: `ratio` is to the same requests without any, on the same engine; `enabled_ratio` is of that to
    an engine that serves no adapters. The fastest of `repeats` runs counts. `one_stream`: also one stream alone, of a prompt twice as long
    and half as many tokens, with an adapter and without."""
    most = max(counts)
    cases = [Case(count, max(count, demand.requests)) for count in counts]
    bases = [Case(0, requests) for requests in dict.fromkeys([demand.requests, *(case.requests for case in cases)])]
    pages = [0, *accumulate(pages_of(demand.ranks, most))]
    off = await _without(model, demand, repeats - repeats // 2, config)  # and the others after the engine that it is compared with
    async with engine_with(model, most, demand.ranks, pages[-1], **config) as (client, names):
        measured = await _take_turns(client, list(dict.fromkeys([*bases, *cases])), demand, names, repeats)
        alone = await _one_stream(client, demand, names[0], repeats) if one_stream else None
        facts = client.model
    off += await _without(model, demand, repeats // 2, config)
    base = {case.requests: max(one.run.rate for one in measured[case]) for case in bases}
    return {
        "workload": f"adapters, {demand.prompt} ids in, {demand.output} tokens out", "model": model, "ranks": list(demand.ranks),
        "rows": [_row(case, measured[case], base[case.requests], pages[case.adapters]) for case in cases],
        "base_tokens_per_s": base[demand.requests], "off_tokens_per_s": max(off), "enabled_ratio": base[demand.requests] / max(off),
        "one_stream": alone, "engine": facts, "config": config,
    }  # fmt: skip


async def _without(model: str, demand: Demand, repeats: int, config: dict[str, Any]) -> list[float]:
    """Tokens a second of an engine that serves no adapters, in each run."""
    if not repeats:
        return []
    case = Case(0, demand.requests)
    async with engine(model, **{"prefix_cache": False, **config, "adapter_pages": 0}) as (client, _):
        measured = await _take_turns(client, [case], demand, [], repeats)  # likewise: a run after a rest is another one
    return [one.run.rate for one in measured[case]]


async def rehearse(client: AsyncClient, work: Workload) -> None:
    """The same requests with only a few tokens: on a GPU graphs are prepared for what came once."""
    await run_workload(client, replace(work, items=[replace(item, max_tokens=min(REHEARSED, item.max_tokens)) for item in work.items]))


async def make_resident(client: AsyncClient, names: Sequence[str]) -> None:
    """Have adapters on the device, by a tiny request for each."""
    await asyncio.gather(*(run_item(client, Item([1, 2, 3, 4], 1, adapter=name)) for name in names))


async def _take_turns(client: AsyncClient, cases: list[Case], demand: Demand, names: list[str], repeats: int) -> dict[Case, list[Measured]]:
    measured: dict[Case, list[Measured]] = {case: [] for case in cases}
    vocab, works = client.model["vocab_size"], {}
    for case in cases:
        works[case] = adapted(case.requests, demand.prompt, demand.output, names[: case.adapters], vocab)
        await rehearse(client, works[case])
    before = await prepared(client)
    for _ in range(repeats):
        for case, found in measured.items():
            if mine := names[: case.adapters]:
                await make_resident(client, mine)
                before = await settled(client)
            run = await run_workload(client, works[case])
            after = await settled(client)
            found.append(Measured(run, step_figures(before, after), loads_between(before, after)))
            before = after
    return measured


async def _one_stream(client: AsyncClient, demand: Demand, name: str, repeats: int) -> dict[str, Any]:
    vocab, prompt, output = client.model["vocab_size"], 2 * demand.prompt, max(2, demand.output // 2)
    works = [adapted(1, prompt, output, names, vocab) for names in ([], [name])]
    for work in works:
        await rehearse(client, work)
    runs = [[(await run_workload(client, work)).rate for work in works] for _ in range(repeats)]
    base, one = (max(rates) for rates in zip(*runs, strict=True))
    return {"prompt": prompt, "output": output, "base_tokens_per_s": base, "output_tokens_per_s": one, "ratio": one / base}


def _row(case: Case, measured: list[Measured], base: float, pages: int) -> dict[str, Any]:
    best = max(measured, key=lambda one: one.run.rate)
    figures = best.run.figures()
    gaps = {name: figures[name] or 0.0 for name in ("itl_p50_s", "itl_p99_s")}  # none where each request came in one chunk
    return {
        "adapters": case.adapters, **figures, **gaps, "ratio": best.run.rate / base, "base_tokens_per_s": base, "pages": pages,
        "loads": best.loads, "runs_tokens_per_s": [one.run.rate for one in measured], **best.steps,
    }  # fmt: skip


def loads_between(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Adapters that were brought to the device between two reports."""
    return counted(before, after, "scheduler", "adapter_loads")


def counted(before: dict[str, Any], after: dict[str, Any], actor: str, name: str) -> int:
    """By how much a count of an actor has grown between two reports; 0 where it does not count that."""
    return int(after[actor].get(name, 0) - before[actor].get(name, 0))
