"""The chaos bench on a shape with random weights, as it is run on a GPU: only executors are killed, and streams may part."""

from __future__ import annotations

import asyncio

import pytest

from penstock.clients.bench.chaos import chaos


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shape_goes_on_after_its_executor_was_killed(dtype: str) -> None:
    figures = asyncio.run(chaos("cpu-1m", 2, 8, 400, 0, ["executor"], dtype=dtype, blocks=2048, threads=1))
    assert figures["exact"] == (dtype == "float32")
    assert (figures["lost"], figures["repeated"]) == (0, 0), figures["odd"]
    assert not figures["exact"] or not figures["diverged"]
    assert figures["blows"] == [["executor"], ["executor"]]
    for first, last in zip(figures["recovery_first_s"], figures["recovery_last_s"], strict=True):
        assert 0 < first <= last
    assert (figures["open"], figures["blocks_held"]) == (0, 0)
