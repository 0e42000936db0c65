"""Clients come and go by the thousand, in every way in which a client can go: the engine keeps nothing of them."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import zmq.asyncio

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.chaos import idle
from penstock.clients.bench.soak import NOISE, weights
from penstock.clients.launcher import alaunch

from .comer import FATES, REQUESTS, Comer

CLIENTS, AT_ONCE = 1000, 25
WARM = 700  # of them, until everything has its size; the flight recorder's small ring is full by then, too


async def come_and_go(address: str, first: int, end: int, seen: Counter[str]) -> None:
    context, places = zmq.asyncio.Context(), asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await Comer(context, address, number, seen).live()

    await asyncio.gather(*(one(number) for number in range(first, end)))
    context.destroy(linger=200)


async def alone(client: AsyncClient) -> None:
    """Until the leases of those who vanished are over."""
    while (await client.status())["clients"] > 1:
        await asyncio.sleep(0.2)


@pytest.mark.timeout(900)
def test_a_thousand_clients_that_come_and_go_leave_the_engine_as_it_was() -> None:
    async def run() -> tuple[dict[str, int], dict[str, int], Counter[str]]:
        seen: Counter[str] = Counter()
        async with alaunch("tiny", executor="mock", blocks=8192, lease=2.0, record_ring=1) as client:
            assert client.address is not None
            await come_and_go(client.address, 0, WARM, seen)
            await alone(client)
            before = await weights(client)
            await come_and_go(client.address, WARM, CLIENTS, seen)
            await alone(client)
            after = await weights(client)
            report = await idle(client)
        assert report["requests"]["open"] == 0
        assert report["scheduler"]["blocks_free"] == report["scheduler"]["blocks_total"]
        assert before.keys() == after.keys()
        return before, after, seen

    before, after, seen = asyncio.run(run())
    growth = {name: after[name] - before[name] for name in after}
    print(f"{CLIENTS} clients, {CLIENTS * REQUESTS} requests: {dict(seen)}; resident bytes {after}, growth {growth}")
    assert sum(seen[fate] for fate in FATES) == CLIENTS
    assert all(seen[fate] > CLIENTS / 6 for fate in FATES)
    assert set(seen) <= {*FATES, "length", "cancelled", "not_found"}  # the last: cancelled before it began
    assert seen["cancelled"] > 50
    assert max(growth.values()) <= NOISE, growth
