"""Twenty thousand requests weigh nothing once they are over. A million: `make soak`."""

from __future__ import annotations

import asyncio

import pytest

from penstock.clients.bench.soak import soak

REQUESTS = 20_000


@pytest.mark.timeout(600)
def test_the_engine_does_not_grow() -> None:
    figures = asyncio.run(soak(REQUESTS, 256))
    print(figures)
    assert figures["wrong"] == 0
    assert figures["finished"] == figures["asked"]
    assert (figures["open"], figures["blocks_held"]) == (0, 0)
    assert figures["flat"], figures["growth_bytes"]
