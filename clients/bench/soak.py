"""`penstock bench soak`: very many short requests, and what the engine's processes weigh before and after."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.chaos import idle
from penstock.clients.errors import PenstockError
from penstock.clients.launcher import alaunch

NOISE = 4 * 2**20  # bytes: what an allocator keeps or gives back from one look to the next
_WARM = 10_000  # requests after which everything has its size: caches are full, arenas are made
_LOOKS, _BETWEEN = 8, 250  # looks, and requests between two: what goes up and down, as the flight recorder's ring, counts at its least


async def soak(requests: int, at_once: int, **config: Any) -> dict[str, Any]:
    """`requests` requests of some 20 ids in and 8 out, `at_once` at a time. Growth is from one state of rest to another: after the first
    ten thousand (or half of them), and after all. The flight recorder's ring is small enough to be full by then."""
    config = {"executor": "mock", "blocks": 4096, "record_ring": 4, **config}
    async with alaunch("tiny", **config) as client:
        await client.generate([1], max_tokens=1)
        begun = time.perf_counter()
        warm = min(_WARM, requests // 2)
        wrong = await _run(client, 0, warm, at_once)
        before = await _least(client, at_once)
        wrong += await _run(client, warm, requests, at_once)
        seconds = time.perf_counter() - begun
        after = await _least(client, at_once)
        report = await idle(client)
    growth = {name: after[name] - before.get(name, 0) for name in after}
    return {
        "requests": requests, "asked": 1 + requests + 2 * _LOOKS * _BETWEEN, "wrong": wrong,
        "requests_per_s": (requests + _LOOKS * _BETWEEN) / seconds, "seconds": seconds,
        "rss_bytes": after, "growth_bytes": growth, "most_growth_bytes": max(growth.values()), "noise_bytes": NOISE,
        "flat": max(growth.values()) <= NOISE, "open": report["requests"]["open"], "finished": report["requests"]["finished"],
        "blocks_held": report["scheduler"]["blocks_total"] - report["scheduler"]["blocks_free"], "config": config,
    }  # fmt: skip


async def _least(client: AsyncClient, at_once: int) -> dict[str, int]:
    """The least weight of each process in several looks."""
    looks = []
    for look in range(_LOOKS):
        await _run(client, look * _BETWEEN, (look + 1) * _BETWEEN, at_once)
        looks.append(await weights(client))
    return {name: min(look[name] for look in looks) for name in looks[0]}


async def weights(client: AsyncClient) -> dict[str, int]:
    """Resident bytes of each actor and of the supervisor, once the engine is at rest."""
    report = await idle(client)
    pids = {f"{row['kind']} {row['index']}": row["pid"] for row in report["actors"]}
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in pids.values()}
    pids |= {f"parent {number}": pid for number, pid in enumerate(sorted(parents))}
    return {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for name, pid in pids.items()}


async def _run(client: AsyncClient, first: int, end: int, at_once: int) -> int:
    """Requests `first` to `end`. Returns how many did not give what was asked for."""
    numbers = iter(range(first, end))

    async def work() -> int:
        wrong = 0
        for number in numbers:
            draw = random.Random(number)
            ids = [draw.randrange(3, 2000) for _ in range(draw.randint(4, 36))]
            tokens = draw.randint(1, 15)
            prompt = f"request {number}" if number % 16 == 0 else ids
            try:
                completion = await client.generate(prompt, max_tokens=tokens, seed=number)
                wrong += len(completion.ids) != tokens
            except PenstockError:
                wrong += 1
        return wrong

    return sum(await asyncio.gather(*(work() for _ in range(at_once))))
