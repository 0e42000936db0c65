"""`penstock bench pipeline`: everything but the model. A mock executor answers each plan at once, so the messages are all there is.

Text prompts, the real tokenizer and detokenizer, one `async for` a stream, all on one client connection.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.measure import Run, Trace
from penstock.clients.bench.offline import engine, settled, step_figures

WORDS = "the list of all the values that are returned by the function when it is called with more than one argument "


async def pipeline(streams: int, prompt: int, output: int, rounds: int, **config: Any) -> tuple[dict[str, Any], Run]:
    """`streams` requests at once, of `prompt` tokens in and `output` out, `rounds` times; the figures are those of the median round."""
    config = {"executor": "mock", "max_running": max(256, streams), **config}
    async with engine("tiny", **config) as (client, startup):
        await _round(client, streams, prompt, 32)
        before = await settled(client)
        runs = [await _round(client, streams, prompt, output) for _ in range(rounds)]
        after = await settled(client)
        idle = await _idle_cpu(client, 5.0)
        run = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        figures = {
            "workload": f"pipeline, {streams} streams, {prompt} tokens in, {output} out", **run.figures(), "startup_s": startup,
            "runs_tokens_per_s": [run.figures()["output_tokens_per_s"] for run in runs],
            "idle_cpu_percent": idle, **step_figures(before, after), "config": config,
        }  # fmt: skip
        return figures, run


async def _round(client: AsyncClient, streams: int, prompt: int, output: int) -> Run:
    async def one(number: int) -> Trace:
        begun = before = time.perf_counter()
        trace = Trace(sent=begun)
        stream = client.stream(f"{number} " + WORDS * (prompt // 8 + 1), truncate=prompt, max_tokens=output, ignore_eos=True, seed=number)
        async for chunk in stream:
            now = time.perf_counter()
            if trace.tokens == 0:
                trace.first = now - begun
            else:
                trace.gaps.append(now - before)  # between chunks: the mean number of tokens in one is reported
            trace.tokens += len(chunk.ids)
            trace.chunks += 1
            before = now
        return trace

    begun = time.perf_counter()
    traces = await asyncio.gather(*(one(number) for number in range(streams)))
    return Run(time.perf_counter() - begun, streams * prompt, list(traces))


async def _idle_cpu(client: AsyncClient, seconds: float) -> float:
    """Percent of one core that all the engine's processes use together while nothing is asked of them."""
    pids = {row["pid"] for row in (await client.status())["actors"]}
    pids |= {int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in pids}  # their parent, the supervisor
    before = sum(_cpu_seconds(pid) for pid in pids)
    await asyncio.sleep(seconds)
    return 100 * (sum(_cpu_seconds(pid) for pid in pids) - before) / seconds


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
