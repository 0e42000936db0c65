"""The benches' figures, on an engine that is small enough to be started for a test. What they are worth is seen elsewhere."""

from __future__ import annotations

import asyncio

import pytest

from penstock.clients.bench.measure import Run, Trace
from penstock.clients.bench.offline import offline, step_figures


def test_prefill_is_counted_from_the_first_request_to_the_last_first_token() -> None:
    run = Run(10.0, 600, [Trace(sent=100.0, first=0.5, tokens=3), Trace(sent=100.5, first=1.5, tokens=3)])
    assert run.figures()["prefill_tokens_per_s"] == pytest.approx(300)


def test_idle_is_the_share_of_what_the_device_might_have_run() -> None:
    scheduler = {"steps": 3, "rows": 9, "step_seconds": 1.0, "host_p50_s": 0.1, "host_p99_s": 0.2, "preemptions": 0}
    before = {"scheduler": scheduler, "executor": {"device_s": 10.0, "idle_s": 5.0}}
    after = {"scheduler": scheduler | {"steps": 5}, "executor": {"device_s": 13.0, "idle_s": 6.0}}
    assert step_figures(before, after)["idle_share"] == pytest.approx(0.25)
    assert step_figures(before, before)["idle_share"] is None


def test_offline_tells_prefill_decode_launch_and_the_device_apart() -> None:
    config = {"device": "cpu", "threads": 1, "max_running": 4}
    figures, _ = asyncio.run(offline("cpu-1m", "decode_b2", 1, time_steps=True, **config))
    assert figures["decode_rows"] == 2
    for name in ("decode_step_s", "prefill_tokens_per_s", "launch_p50_s", "launch_p99_s", "plan_commit_p50_s", "device_step_p50_s"):
        assert figures[name] > 0, name
    assert 0 <= figures["idle_share"] < 1
