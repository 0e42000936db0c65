"""The bench of adapters on engines that are small enough for a test: what it makes is right, and its figures are there and make sense."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.clients.bench.adapters import Demand, adapters, read_counts
from penstock.clients.bench.cold import Residents, Window, cold
from penstock.clients.bench.command import app
from penstock.clients.bench.lora import PAGE, config_of, linears, pages_of, write_adapters
from penstock.clients.bench.measure import Run, Trace
from penstock.clients.bench.picture import plot_adapters
from penstock.clients.bench.turns import oversubscribed, shares
from penstock.clients.bench.workloads import adapted
from penstock.clients.errors import InvalidRequest
from penstock.engine.lora.layout import RANKS, Site
from penstock.engine.lora.read import read_adapter

SMALL: dict[str, Any] = {"device": "cpu", "threads": 1, "max_running": 16}


@pytest.mark.parametrize("model", ["tiny", "cpu-1m", "qwen3-0.6b"])
def test_the_adapters_that_it_makes_are_ones_and_all_different(model: str, tmp_path: Path) -> None:
    config = config_of(model) | {"num_hidden_layers": 2}
    sites = {name: Site(name, *sizes) for name, sizes in linears(config).items()}
    folders = write_adapters(config, tmp_path, 3, [4, 20], flush=True)
    found = [read_adapter(folder, sites) for folder in folders]
    assert [lora.rank for lora in found] == [4, 20, 4]
    assert all(set(lora.weights) == set(sites) for lora in found)
    assert len({lora.digest for lora in found}) == 3
    a, b = found[1].weights["model.layers.1.mlp.down_proj"]
    assert 2**-7 <= min(a.abs().min(), b.abs().min()) < max(a.abs().max(), b.abs().max()) < 2**-5
    assert abs(a.sign().mean()) < 0.1
    assert PAGE == RANKS
    assert pages_of([4, 20], 3) == [1, 2, 1]


def test_what_is_no_model_for_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must be tiny, a folder"):
        config_of("some/hub-id")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 768}))
    with pytest.raises(InvalidRequest, match=r"model_type=gpt2: .* is missing"):
        linears(config_of(str(tmp_path)))


def test_one_table_at_a_time() -> None:
    done = CliRunner().invoke(app, ["adapters", "--oversubscribed", "--cold", "--rank", "8", "--rank", "16", "--no-one-stream"])
    assert done.exit_code == 1
    assert "one at a time" in done.output


def test_requests_take_adapters_in_turn() -> None:
    assert [item.adapter for item in adapted(5, 3, 4, ["a", "b"], 100).items] == ["a", "b", "a", "b", "a"]
    assert adapted(2, 3, 4, [], 100).items[0].adapter is None
    assert adapted(5, 3, 4, [], 100).items[4].ids == adapted(5, 3, 4, ["a", "b"], 100).items[4].ids
    assert read_counts("0, 1,8,8") == [0, 1, 8]
    for text in ("0", "", "1,x", "-1"):
        with pytest.raises(InvalidRequest, match="counts"):
            read_counts(text)


def test_a_trace_says_when_its_tokens_came() -> None:
    trace = Trace(sent=10.0, first=1.0, gaps=[0.5, 0.25], tokens=4)  # two of them in its first chunk
    assert trace.times() == [11.0, 11.0, 11.5, 11.75]
    assert Trace().times() == []
    assert Run(2.0, 8, [trace, trace]).rate == 4.0
    assert Residents(1, [trace]).gaps(Window(11.1, 11.2, [])) == [0.5]


def test_shares_are_of_the_mean() -> None:
    assert shares([5, 5, 5]) == {"jain_index": 1.0, "share_min": 1.0, "share_max": 1.0}
    assert shares([8, 0]) == {"jain_index": 0.5, "share_min": 0.0, "share_max": 2.0}


def test_rows_are_beside_the_same_requests_without_adapters(tmp_path: Path) -> None:
    demand = Demand(requests=4, prompt=12, output=40, ranks=(8, 24))
    figures = asyncio.run(adapters("cpu-1m", [0, 6], demand, 1, **SMALL))
    assert [(row["adapters"], row["requests"], row["pages"], row["loads"]) for row in figures["rows"]] == [
        (0, 4, 0, 0),
        (6, 6, 9, 0),
    ]
    assert [row["output_tokens"] for row in figures["rows"]] == [160, 240]
    for row in figures["rows"]:
        assert row["ratio"] == pytest.approx(row["output_tokens_per_s"] / row["base_tokens_per_s"])
        assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"]
        assert 0 <= row["itl_p50_s"] <= row["itl_p99_s"]
        assert row["steps"] > 0
    assert figures["rows"][0]["ratio"] == 1.0
    assert figures["enabled_ratio"] == pytest.approx(figures["base_tokens_per_s"] / figures["off_tokens_per_s"])
    assert figures["one_stream"]["ratio"] > 0
    assert (figures["one_stream"]["prompt"], figures["one_stream"]["output"]) == (24, 20)
    json.dumps(figures)
    plot_adapters(tmp_path / "adapters.png", "adapters", figures["rows"])
    assert (tmp_path / "adapters.png").read_bytes().startswith(b"\x89PNG")


def test_more_adapters_than_fit_take_turns() -> None:
    demand = Demand(requests=0, prompt=8, output=6, ranks=(8,))
    figures, series = asyncio.run(oversubscribed("cpu-1m", 8, 4, 2, 2, demand, **SMALL))
    assert (figures["registered"], figures["in_use"], figures["pages"], figures["requests"]) == (8, 4, 2, 8)
    assert figures["output_tokens"] == 8 * 6
    assert figures["loads"] >= 2
    assert 0 < figures["ttft_p50_s"] <= figures["ttft_p90_s"] <= figures["ttft_p99_s"] <= figures["ttft_max_s"]
    assert 1 / 4 <= figures["jain_index"] <= 1
    assert 0 <= figures["share_min"] <= 1 <= figures["share_max"] <= 4
    assert [len(values) for values in series.values()] == [8, 8]
    json.dumps(figures)
    with pytest.raises(InvalidRequest, match="in_use=4"):
        asyncio.run(oversubscribed("cpu-1m", 3, 4, 2, 2, demand, **SMALL))


def test_cold_adapters_arrive_beside_streams() -> None:
    demand = Demand(requests=0, prompt=8, output=0, ranks=(16,))
    figures, series = asyncio.run(cold("tiny", 2, 3, 0.5, 0.05, demand, **SMALL))
    assert (figures["resident"], figures["arrive"]) == (2, 3)
    for name in ("before", "during", "after", "again"):
        assert 0 < figures[f"itl_{name}_p50_s"] <= figures[f"itl_{name}_p99_s"]
        assert figures["gaps"][name] == len(series[name]) > 0
    alone = (figures["itl_before_p99_s"] + figures["itl_after_p99_s"]) / 2
    assert figures["growth_p99"] == pytest.approx(figures["itl_during_p99_s"] / alone - 1)
    assert figures["again_to_first_max_s"] < figures["asked_to_first_max_s"]
    assert figures["asked_to_first_p50_s"] <= figures["asked_to_first_max_s"]
    json.dumps(figures)
