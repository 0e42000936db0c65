"""`penstock bench fairness`: what one tenant gets beside another that is well-behaved, and beside one that floods the engine.

    equal     the neighbour asks for the same as the tenant that is measured
    flood     it has hundreds of long requests open, all the time, and asks again at once for what is refused
    backlog   both flood

The phases take turns on one engine, again and again, so that a machine that is busy now and then disturbs all of them alike; a ratio is
of two phases that follow each other, and the median of the ratios counts. Prompts are random, so nothing is found in the prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.chaos import idle
from penstock.clients.bench.offline import engine
from penstock.clients.errors import InvalidRequest, Retryable

BAR = 0.9
MOCK = {"executor": "mock", "mock_step": 0.004, "token_budget": 512}  # as slow as a small model, but no noise and no load
_AGAIN_S = 0.02  # before what was refused is asked for again: sooner than the engine says, as a flood would


@dataclass(frozen=True, slots=True)
class Demand:
    """What a tenant asks for: `streams` open all the time, each of `prompt` ids and at most `output` tokens, and half of that at least."""

    streams: int
    prompt: int
    output: int
    connections: int = 1


@dataclass(frozen=True, slots=True)
class Contest:
    """A scarce resource: the engine's slots, as a multiple of the streams of a well-behaved tenant; its KV blocks, if they are scarce; and
    what a flood asks for."""

    name: str
    slots: int
    blocks: int | None
    flood: Demand


LONG, PROMPTS = Demand(300, 32, 800, 2), Demand(300, 700, 16, 2)
CONTESTS = (
    Contest("slots", 2, None, LONG),
    Contest("blocks", 8, 256, LONG),
    Contest("prefill", 2, None, PROMPTS),
    Contest("step", 16, None, LONG),
)


@dataclass(slots=True)
class Served:
    """A tenant, as its clients saw it: prompt tokens of streams that began, tokens that came, refusals; and seconds to first tokens."""

    prompts: int = 0
    tokens: int = 0
    refused: int = 0
    firsts: list[float] = field(default_factory=list)

    @property
    def service(self) -> int:
        return self.prompts + self.tokens


@dataclass(frozen=True, slots=True)
class Phase:
    """Tokens a second of the tenant that is measured, its share of all service, and its median time to a first token, in seconds."""

    rate: float
    share: float
    first: float | None
    refused: int


async def fairness(model: str | None, only: list[str], rounds: int, seconds: float, streams: int, **config: Any) -> dict[str, Any]:
    """Every contest named in `only` (all, if none is), `rounds` times through its phases of `seconds` each. A well-behaved tenant has
    `streams` streams open; slots are scarce when two of them take all."""
    known = {contest.name: contest for contest in CONTESTS}
    for name in only:
        if name not in known:
            raise InvalidRequest(f"contest={name!r}: must be {', '.join(known)}", field="contest", value=name, limit=", ".join(known))
    rows = [await _contest(known[name], model, rounds, seconds, streams, config) for name in only or known]
    worst = min(rows, key=lambda row: row["ratio"])
    share = min(min(row["share_when_backlogged"], 1 - row["share_when_backlogged"]) for row in rows)  # of whoever gets less
    return {
        "beside_equal": worst["beside_equal"], "beside_flood": worst["beside_flood"], "ratio": worst["ratio"],
        "share_when_backlogged": share, "fair": worst["ratio"] >= BAR and 2 * share >= BAR, "contests": rows, "model": model or "mock",
    }  # fmt: skip


async def _contest(contest: Contest, model: str | None, rounds: int, seconds: float, streams: int, more: dict[str, Any]) -> dict[str, Any]:
    modest, flood = Demand(streams, 32, 64), contest.flood
    scarce = {"max_running": contest.slots * streams} | ({} if contest.blocks is None else {"blocks": contest.blocks})
    config = {**(MOCK if model is None else {}), **scarce, **more}
    equal: list[Phase] = []
    beside: list[Phase] = []
    backlog: list[Phase] = []
    async with engine(model or "tiny", **config) as (client, _):
        for number in range(rounds):
            for phases, ours, theirs in ((equal, modest, modest), (beside, modest, flood), (backlog, flood, flood)):
                phases.append(await _phase(client, ours, theirs, seconds, number))
                await idle(client)
    ratios = [two.rate / one.rate for one, two in zip(equal, beside, strict=True) if one.rate]
    return {
        "contest": contest.name,
        "beside_equal": statistics.median(phase.rate for phase in equal),
        "beside_flood": statistics.median(phase.rate for phase in beside),
        "ratio": statistics.median(ratios) if ratios else 0.0,
        "ratios": ratios,
        "share_when_backlogged": statistics.median(phase.share for phase in backlog),
        "shares": [phase.share for phase in backlog],
        "share_beside_flood": statistics.median(phase.share for phase in beside),
        "first_equal_s": _median([phase.first for phase in equal]),
        "first_flood_s": _median([phase.first for phase in beside]),
        "refused": sum(phase.refused for phase in beside),
        "config": config,
    }


async def _phase(client: AsyncClient, ours: Demand, theirs: Demand, seconds: float, seed: int) -> Phase:
    """The neighbour first; then, once it has what it wants, the tenant that is measured."""
    me, other = Served(), Served()
    async with _busy(client, "other", theirs, other, seed):
        await asyncio.sleep(seconds / 4)
        async with _busy(client, "me", ours, me, seed):
            await asyncio.sleep(seconds / 4)
            before, begun = replace(me), time.perf_counter()
            others, firsts = other.service, len(me.firsts)
            await asyncio.sleep(seconds)
            spent = time.perf_counter() - begun
            mine, both = me.service - before.service, me.service - before.service + other.service - others
            rate, refused = (me.tokens - before.tokens) / spent, me.refused - before.refused
            return Phase(rate, mine / max(1, both), _median(me.firsts[firsts:]), refused)


@asynccontextmanager
async def _busy(client: AsyncClient, tenant: str, demand: Demand, served: Served, seed: int) -> AsyncIterator[None]:
    """A tenant, on connections of its own, that asks for `demand` until this is left."""
    draw = random.Random(f"{tenant} {seed}")
    vocab = int(client.model["vocab_size"])
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(client.address, tenant=tenant)) for _ in range(demand.connections)]
        tasks = [asyncio.ensure_future(_repeat(clients[at % len(clients)], demand, served, draw, vocab)) for at in range(demand.streams)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _repeat(client: AsyncClient, demand: Demand, served: Served, draw: random.Random, vocab: int) -> None:
    while True:
        ids = [draw.randrange(vocab // 4, vocab // 2) for _ in range(demand.prompt)]
        output, begun, first = draw.randint((demand.output + 1) // 2, demand.output), time.perf_counter(), True
        try:
            async for chunk in client.stream(ids, max_tokens=output, ignore_eos=True, temperature=0.0):
                if first and chunk.ids:
                    first = False
                    served.prompts += len(ids)
                    served.firsts.append(time.perf_counter() - begun)
                served.tokens += len(chunk.ids)
        except Retryable:
            served.refused += 1
            await asyncio.sleep(_AGAIN_S)


def _median(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
