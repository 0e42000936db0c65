"""`penstock bench offline` and `online`: a whole engine, measured from a client."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from penstock.actors.config import WRITING_S
from penstock.clients.aio import AsyncClient
from penstock.clients.bench.measure import Run, run_item, run_poisson, run_workload
from penstock.clients.bench.profile import begin_after, read_profile
from penstock.clients.bench.shapes import SHAPES, write_model
from penstock.clients.bench.workloads import Item, Workload, decode, find
from penstock.clients.errors import EngineFault, InvalidRequest
from penstock.clients.launcher import alaunch

SETTLED_S = 2.2  # after which reports have all that has ended: actors report once a second
MOST_REPORTS = 150  # until an executor must have nothing left to prepare, while nobody asks it for anything


@asynccontextmanager
async def engine(model: str, **config: Any) -> AsyncIterator[tuple[AsyncClient, float]]:
    """An engine for `model`: the name of a shape (with random weights), a folder, a hub id or `tiny`. Yields a client, after a small
    warm-up request, and the seconds that the engine took to be ready."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        source = model
        if model in SHAPES:
            source = str(write_model(model, Path(folder)))
            config = {"weights": "random", **config}
        begun = time.perf_counter()
        async with alaunch(source, **config) as client:
            startup = time.perf_counter() - begun
            await run_item(client, Item([1, 2, 3, 4, 5, 6, 7, 8], 8))
            yield client, startup


def workload_for(name: str, vocab: int) -> Workload:
    """Raises `InvalidRequest` for an unknown name."""
    try:
        return find(name)(vocab)
    except KeyError:
        limit = "mixed256, prefill, cpu64, cpu1 or decode_bN"
        raise InvalidRequest(f"workload={name!r}: must be {limit}", field="workload", value=name, limit=limit) from None


async def offline(model: str, workloads: list[str], repeats: int, **config: Any) -> list[tuple[dict[str, Any], Run]]:
    """Run each workload `repeats` times, one workload after the other on a fresh engine that is `prepared`, which took `prepared_s` after
    it was ready; the figures of each are those of its fastest run. With `profile`, a file's name, a single workload is run once more, and
    a trace of some of its steps goes there."""
    config = {"prefix_cache": False, **config}
    if config.get("profile") is not None:
        if len(workloads) != 1:
            raise InvalidRequest("profile: a trace is of one workload", field="workload", value=", ".join(workloads), limit="one")
        vocab = SHAPES.get(model, {}).get("vocab_size", 32_000)  # of others roughly: lengths are drawn after ids
        begin = begin_after(workload_for(workloads[0], vocab), repeats)
        config = {"profile_after": begin, "stall_timeout": WRITING_S, **config, "profile": str(Path(config["profile"]).absolute())}
    measured: list[tuple[dict[str, Any], Run]] = []
    async with engine(model, **config) as (client, startup):
        works = [workload_for(name, client.model["vocab_size"]) for name in workloads]
        begun = time.perf_counter()
        before = await prepared(client)
        prepared_s = time.perf_counter() - begun
        for work in works:
            runs = [await run_workload(client, work) for _ in range(repeats)]
            after = await settled(client)
            best = min(runs, key=lambda run: run.seconds)
            figures = {
                "workload": work.name, "model": model, **best.figures(), "startup_s": startup, "prepared_s": prepared_s,
                "opening_s": before["executor"].get("opening_s"),
                "runs_s": [run.seconds for run in runs], **step_figures(before, after), "engine": client.model, "config": config,
            }  # fmt: skip
            measured.append((figures, best))
            before = after
        if "profile" in config:
            await run_workload(client, works[0])
            await settled(client)
    if "profile" in config:
        measured[0][0]["profile"] = read_profile(Path(config["profile"]))
    return measured


async def online(
    model: str, rates: list[float], requests: int, prompt: int, output: int, **config: Any
) -> tuple[dict[str, Any], dict[float, Run]]:
    """Poisson arrivals at each rate, requests a second; `requests` of `prompt` ids, `output` tokens each."""
    config = {"prefix_cache": False, **config}
    runs: dict[float, Run] = {}
    async with engine(model, **config) as (client, startup):
        vocab = client.model["vocab_size"]
        await run_workload(client, decode(8, vocab))
        await prepared(client)
        items = [Item((item.ids * (prompt // 512 + 1))[:prompt], output) for item in decode(requests, vocab).items]
        for rate in rates:
            runs[rate] = await run_poisson(client, items, rate)
        first = next(iter(runs.values())).figures()
        figures = {
            "workload": "online", "model": model, **first, "startup_s": startup,
            "rates": [{"rate": rate, **run.figures()} for rate, run in runs.items()],
            "engine": client.model, "config": config,
        }  # fmt: skip
    return figures, runs


async def prepared(client: AsyncClient) -> dict[str, Any]:
    """The report, once the executor has nothing left to prepare: on a GPU it captures graphs while it rests, for some seconds after the
    start. Raises `EngineFault`."""
    for _ in range(MOST_REPORTS):
        status = await settled(client)
        if not status["executor"].get("preparing"):
            return status
    text = f"the executor still prepares after {MOST_REPORTS} reports, {SETTLED_S:g} s apart: it does not rest, or starts again and again"
    raise EngineFault(text)


async def settled(client: AsyncClient) -> dict[str, Any]:
    """The report, once its sums are those of all that has ended."""
    await asyncio.sleep(SETTLED_S)
    return await client.status()


def step_figures(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What scheduler and executor counted between two reports. The executor's medians and percentiles are over the steps since it last
    rested, those of `plan_commit` over the scheduler's last 1,024. `decode_step_s` is the median of steps that have only decodes, and nine
    tenths or more of the most that any of them has. `idle_share` is the share of the time for which the device had no step although one
    was launched or a stream was there, known only if the engine runs with `time_steps`."""
    first, last = before["scheduler"], after["scheduler"]
    steps = last["steps"] - first["steps"]
    executor = after["executor"]
    sums = {name: executor.get(name, 0.0) - before["executor"].get(name, 0.0) for name in ("device_s", "idle_s")}
    return {
        "steps": steps,
        "batch_mean": (last["rows"] - first["rows"]) / steps if steps else 0.0,
        "step_mean_s": (last["step_seconds"] - first["step_seconds"]) / steps if steps else 0.0,
        "decode_step_s": executor.get("decode_step_s"),
        "decode_rows": executor.get("decode_rows"),
        "launch_p50_s": executor.get("launch_p50_s"),
        "launch_p99_s": executor.get("launch_p99_s"),
        "plan_commit_p50_s": last["host_p50_s"],
        "plan_commit_p99_s": last["host_p99_s"],
        "device_step_p50_s": executor.get("device_step_p50_s"),
        "idle_share": sums["idle_s"] / sum(sums.values()) if sums["device_s"] else None,
        "preemptions": last["preemptions"] - first["preemptions"],
    }
