"""The benches' figures, on an engine that is small enough to be started for a test. What they are worth is seen elsewhere."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from penstock.clients.bench.kv import Told, compare, kv
from penstock.clients.bench.measure import Run, Trace
from penstock.clients.bench.offline import offline, step_figures
from penstock.clients.bench.picture import plot_rates
from penstock.clients.bench.profile import STEP, begin_after, read_profile
from penstock.clients.bench.workloads import find
from penstock.clients.errors import PenstockError


def test_prefill_is_counted_from_the_first_request_to_the_last_first_token() -> None:
    run = Run(10.0, 600, [Trace(sent=100.0, first=0.5, tokens=3), Trace(sent=100.5, first=1.5, tokens=3)])
    assert run.figures()["prefill_tokens_per_s"] == pytest.approx(300)


def test_idle_is_the_share_of_what_the_device_might_have_run() -> None:
    scheduler = {"steps": 3, "rows": 9, "step_seconds": 1.0, "host_p50_s": 0.1, "host_p99_s": 0.2, "preemptions": 0}
    before = {"scheduler": scheduler, "executor": {"device_s": 10.0, "idle_s": 5.0}}
    after = {"scheduler": scheduler | {"steps": 5}, "executor": {"device_s": 13.0, "idle_s": 6.0}}
    assert step_figures(before, after)["idle_share"] == pytest.approx(0.25)
    assert step_figures(before, before)["idle_share"] is None


def test_offline_tells_prefill_decode_launch_and_the_device_apart_and_writes_a_trace(tmp_path: Path) -> None:
    config = {"device": "cpu", "threads": 1, "max_running": 4}
    path = tmp_path / "trace.json.gz"
    [(figures, _)] = asyncio.run(offline("cpu-1m", ["decode_b2"], 1, time_steps=True, profile=str(path), **config))
    assert figures["decode_rows"] == 2
    for name in ("decode_step_s", "prefill_tokens_per_s", "launch_p50_s", "launch_p99_s", "plan_commit_p50_s", "device_step_p50_s"):
        assert figures[name] > 0, name
    assert 0 <= figures["idle_share"] < 1
    assert figures["profile"]["traced_steps"] == 64
    assert 0 < figures["profile"]["busy_share"] <= 1
    assert figures["profile"] == read_profile(path)


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {} if correlation is None else {"correlation": correlation}}


def test_a_trace_says_when_the_device_waited_for_the_next_step(tmp_path: Path) -> None:
    """Two steps: 10 to 40 with a hole of 10 within, and 60 to 70. What was launched before the trace belongs to neither."""
    events = [
        event("user_annotation", STEP, 0, 8), event("cuda_runtime", "cudaGraphLaunch", 1, 2, 7), event("kernel", "a", 10, 10, 7),
        event("kernel", "b", 30, 10, 7), event("user_annotation", STEP, 20, 4), event("cuda_runtime", "cudaGraphLaunch", 21, 1, 8),
        event("gpu_memcpy", "c", 60, 4, 8), event("kernel", "d", 62, 8, 8), event("kernel", "earlier", 2, 3, 5),
        event("cuda_runtime", "cudaEventSynchronize", 12, 50), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = read_profile(path)
    assert found["traced_steps"] == 2
    assert found["traced_s"] == pytest.approx(60e-6)
    assert found["busy_share"] == pytest.approx(30 / 60)
    assert found["idle_between_share"] == pytest.approx(20 / 60)
    assert found["gap_p50_s"] == pytest.approx(20e-6)
    assert found["device_step_p50_s"] == pytest.approx(20e-6)
    assert found["host_step_p50_s"] == pytest.approx(6e-6)


def test_no_trace_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match=r"nothing\.json"):
        read_profile(tmp_path / "nothing.json")
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    with pytest.raises(PenstockError, match="no step"):
        read_profile(tmp_path / "empty.json")


def test_a_trace_begins_within_the_run_after_the_measured_ones() -> None:
    for name in ("mixed256", "decode_b8", "prefill", "cpu64"):
        work = find(name)(32_000)
        run = work.input_tokens + work.output_tokens - len(work.items)
        assert 2 * run < begin_after(work, 2) < 3 * run


@pytest.mark.parametrize("rates", [(4.0,), (2.0, 8.0, 32.0)])
def test_the_picture_of_rates_is_a_png(tmp_path: Path, rates: tuple[float, ...]) -> None:
    traces = [Trace(first=0.1 * (number + 1), gaps=[0.01, 0.02], tokens=3) for number in range(5)]
    plot_rates(tmp_path / "rates.png", "rates", {rate: Run(1.0, 5, traces) for rate in rates})
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PenstockError, match="cannot write"):
        plot_rates(tmp_path / "no" / "rates.png", "rates", {rates[0]: Run(1.0, 5, traces)})


def test_two_engines_are_compared_token_by_token() -> None:
    one, other = Told([-1.0, -2.0, -3.0], [5, 6, 7], [[1, 2], [3, 4]]), Told([-1.0, -2.5, -2.0], [5, 6, 8], [[1, 9], [3, 4]])
    found = compare(one, other)
    assert found["difference_mean"] == pytest.approx(0.5)
    assert found["difference_max"] == pytest.approx(1.0)
    assert (found["likeliest_same"], found["greedy_same"], found["continuations_same"]) == (pytest.approx(2 / 3), 0.75, 0.5)
    assert one.perplexity == pytest.approx(math.exp(2.0))


def test_eight_bits_a_key_move_the_log_probabilities_of_tiny_a_little() -> None:
    figures = asyncio.run(kv("tiny", 2, 100, 8, device="cpu", threads=1, max_running=4))
    assert (figures["kv_dtype_auto"], figures["kv_dtype_fp8"]) == ("float32", "float8_e4m3fn")
    assert figures["difference_mean_again"] < 1e-4 < 1e-3 < figures["difference_mean"] < 0.2
    assert figures["perplexity_fp8"] == pytest.approx(figures["perplexity_auto"], rel=0.1)
    assert figures["likeliest_same"] > 0.85
    assert figures["greedy_same_again"] == 1.0
    assert 0 <= figures["greedy_same"] <= 1
