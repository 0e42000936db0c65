"""`penstock bench`: figures that anyone can measure again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.actors.config import EngineConfig
from penstock.clients.bench.adapters import ADAPTED_COLUMNS, ONE_COLUMNS, Demand, adapters, read_counts
from penstock.clients.bench.apart import against_transformers
from penstock.clients.bench.chaos import chaos
from penstock.clients.bench.cold import cold
from penstock.clients.bench.fairness import fairness
from penstock.clients.bench.kernels import COLUMNS, kernels
from penstock.clients.bench.kv import kv
from penstock.clients.bench.offline import offline, online
from penstock.clients.bench.picture import plot, plot_adapters, plot_rates
from penstock.clients.bench.pipeline import pipeline
from penstock.clients.bench.report import machine, show, show_rows
from penstock.clients.bench.soak import soak
from penstock.clients.bench.turns import oversubscribed
from penstock.clients.cli.options import only_given, with_tables
from penstock.clients.cli.report import reported
from penstock.clients.errors import PenstockError

app = typer.Typer(help="Measure this engine, and others beside it.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on the last line, or on one for each workload")]
Plot = Annotated[Path | None, typer.Option("--plot", help="write a picture of the distributions to this PNG file")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="a folder; random weights: cpu-1m, cpu-32m, qwen3-0.6b, qwen3-8b, qwen3-30b-a3b, llama-3.1-8b"),
]


@app.command("offline")
@with_tables(EngineConfig, panels=("Engine",), skip=("model",))
def offline_command(
    workload: Annotated[
        list[str] | None, typer.Option(help="mixed256, decode_bN, prefill, cpu64 or cpu1; may be repeated  [default: cpu64]")
    ] = None,
    model: Model = None,
    repeats: Annotated[int, typer.Option(help="runs of each; the fastest counts", min=1)] = 1,
    against: Annotated[str | None, typer.Option(help="`transformers`: run the same through it in the same call")] = None,
    as_json: Json = False,
    plot_file: Plot = None,
    **given: Any,
) -> None:
    """Fixed workloads, each from its first request to its last token, through every actor."""
    with reported():
        if against not in (None, "transformers"):
            raise PenstockError(f"against={against!r}: must be transformers")
        names = workload or ["cpu64"]
        shape = model or ("cpu-32m" if all(name.startswith("cpu") for name in names) else "qwen3-0.6b")
        series = {}
        for figures, run in asyncio.run(offline(shape, names, repeats, **only_given(given))):
            name = figures["workload"]
            if against is not None:
                figures["against"] = against_transformers(shape, name, figures["output_tokens_per_s"])
            figures["machine"] = machine()
            series[f"first token, {name}"] = [trace.first for trace in run.traces]
            show(f"{name} on {shape}", figures, as_json=as_json)
        if plot_file is not None:
            plot(plot_file, shape, series, "seconds", "share of requests")


@app.command("online")
@with_tables(EngineConfig, panels=("Engine",), skip=("model",))
def online_command(
    model: Model = None,
    rate: Annotated[list[float] | None, typer.Option(help="requests a second; may be repeated  [default: 4]")] = None,
    requests: Annotated[int, typer.Option(help="at each rate", min=1)] = 128,
    prompt: Annotated[int, typer.Option(help="ids in each prompt", min=1)] = 512,
    output: Annotated[int, typer.Option(help="tokens for each", min=1)] = 128,
    as_json: Json = False,
    plot_file: Plot = None,
    **given: Any,
) -> None:
    """Requests that arrive by themselves, at random moments: time to the first token, and between tokens."""
    with reported():
        figures, runs = asyncio.run(online(model or "cpu-32m", rate or [4.0], requests, prompt, output, **only_given(given)))
        figures["machine"] = machine()
        if plot_file is not None:
            plot_rates(plot_file, f"online, {figures['model']}: {prompt} ids in, {output} tokens out", runs)
        show("online", figures, as_json=as_json)


@app.command("adapters")
@with_tables(EngineConfig, panels=("Engine",), skip=("model", "executor", "adapters", "adapter_sources"))
def adapters_command(
    counts: Annotated[str, typer.Option(help="numbers of adapters that share a batch")] = "0,1,8,32,64,128",
    rank: Annotated[list[int] | None, typer.Option(help="of the adapters; may be repeated: in turn  [default: 16]", min=1)] = None,
    model: Annotated[
        str | None, typer.Option(help="`tiny`, a shape as of `offline`, or a folder; none: llama-3.1-8b with a GPU, else cpu-32m")
    ] = None,
    repeats: Annotated[int, typer.Option(help="runs of each; the fastest counts", min=1)] = 2,
    requests: Annotated[int, typer.Option(help="all at once, and as many as there are adapters at least", min=1)] = 64,
    prompt: Annotated[int, typer.Option(help="ids in each prompt", min=1)] = 256,
    output: Annotated[int, typer.Option(help="tokens for each", min=2)] = 256,
    one_stream: Annotated[bool, typer.Option(help="measure one stream alone, too")] = True,
    turns: Annotated[bool, typer.Option("--oversubscribed", help="instead: more adapters in use than fit on the device")] = False,
    registered: Annotated[int, typer.Option(help="adapters that are known then", min=1)] = 500,
    in_use: Annotated[int, typer.Option(help="those of them that have a stream each", min=1)] = 200,
    pool: Annotated[int, typer.Option(help="those that fit on the device", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="requests of each, one after another", min=1)] = 2,
    arriving: Annotated[
        bool, typer.Option("--cold", help="instead: adapters that were never asked for arrive while others decode")
    ] = False,
    resident: Annotated[int, typer.Option(help="streams that decode then", min=1)] = 32,
    arrive: Annotated[int, typer.Option(help="adapters that arrive", min=1)] = 32,
    every: Annotated[float, typer.Option(help="seconds from one that arrives to the next; 0: all at once", min=0.0)] = 0.0,
    seconds: Annotated[float, typer.Option(help="before and after they do", min=0.1)] = 5.0,
    as_json: Json = False,
    plot_file: Plot = None,
    **given: Any,
) -> None:
    """Requests with many LoRA adapters, made for this, beside the same requests without."""
    with reported():
        if turns and arriving:
            raise PenstockError("--oversubscribed and --cold are two measurements: one at a time")
        facts = machine()
        shape = model or ("cpu-32m" if facts["gpu"] is None else "llama-3.1-8b")
        config, demand = only_given(given), Demand(requests, prompt, output, tuple(rank or [16]))
        series: dict[str, list[float]] | None = None
        if turns:
            figures, series = asyncio.run(oversubscribed(shape, registered, in_use, pool, rounds, demand, **config))
        elif arriving:
            figures, series = asyncio.run(cold(shape, resident, arrive, seconds, every, demand, **config))
        else:
            figures = asyncio.run(adapters(shape, read_counts(counts), demand, repeats, one_stream=one_stream, **config))
            show_rows(f"adapters on {shape}", figures["rows"], ADAPTED_COLUMNS, as_json=as_json)
            if one_stream:
                show_rows("one stream", [figures["one_stream"]], ONE_COLUMNS, as_json=as_json)
        if plot_file is not None:
            title = f"{figures['workload']}, {shape}"
            if series is None:
                plot_adapters(plot_file, title, figures["rows"])
            else:
                plot(plot_file, title, series, "seconds to the first token" if turns else "seconds between tokens", "share")
        figures["machine"] = facts
        show("adapters", figures, as_json=as_json)


@app.command("kernels")
def kernels_command(
    model: Annotated[str, typer.Option(help="a shape, as of `offline`, or a folder with a config.json")] = "qwen3-0.6b",
    rows: Annotated[list[str] | None, typer.Option(help="rows, or several as 1,8,32; may be repeated  [default: 1,8,32,128,256]")] = None,
    keys: Annotated[int, typer.Option(help="keys that each decode attends to", min=1)] = 576,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="of keys and values: auto or fp8")] = "auto",
    as_json: Json = False,
) -> None:
    """Each kernel alone, beside its floor: the least time that its bytes or its flops could take on this device."""
    with reported():
        figures = kernels(model, rows or ["1,8,32,128,256"], keys, dtype, device, kv_dtype)
        figures["machine"] = machine()
        show_rows(f"kernels of {model}", figures["rows"], COLUMNS, as_json=as_json)
        show("ceilings", figures, as_json=as_json)


@app.command("kv")
@with_tables(EngineConfig, panels=("Engine",), skip=("model", "executor", "kv_dtype"))
def kv_command(
    model: Annotated[str, typer.Option(help="`tiny`, a shape as of `offline`, a folder or a hub id")] = "tiny",
    passages: Annotated[int, typer.Option(help="texts of the model's own", min=1)] = 8,
    length: Annotated[int, typer.Option(help="tokens in each, about", min=1)] = 512,
    output: Annotated[int, typer.Option(help="greedy tokens after each", min=1)] = 64,
    as_json: Json = False,
    **given: Any,
) -> None:
    """What eight-bit keys and values do to a model: log-probabilities and greedy tokens beside those of its own dtype."""
    with reported():
        figures = asyncio.run(kv(model, passages, length, output, **only_given(given)))
        figures["machine"] = machine()
        show("kv", figures, as_json=as_json)


@app.command("pipeline")
@with_tables(EngineConfig, panels=("Engine",), skip=("model", "executor"))
def pipeline_command(
    streams: Annotated[int, typer.Option(min=1)] = 256,
    prompt: Annotated[int, typer.Option(help="tokens in", min=1)] = 32,
    output: Annotated[int, typer.Option(help="tokens out", min=1)] = 512,
    rounds: Annotated[int, typer.Option(help="the median counts", min=1)] = 5,
    as_json: Json = False,
    plot_file: Plot = None,
    **given: Any,
) -> None:
    """Everything but the model: a mock executor, real messages, tokenizer, detokenizer and client."""
    with reported():
        figures, run = asyncio.run(pipeline(streams, prompt, output, rounds, **only_given(given)))
        figures["machine"] = machine()
        if plot_file is not None:
            plot(plot_file, "pipeline", {"gap between chunks": [gap for trace in run.traces for gap in trace.gaps]}, "seconds", "share")
        show("pipeline", figures, as_json=as_json)


@app.command("chaos")
@with_tables(EngineConfig, panels=("Engine",), skip=("model", "seed"))
def chaos_command(
    kills: Annotated[int, typer.Option(help="actors to kill", min=1)] = 50,
    model: Annotated[str | None, typer.Option(help="`tiny`, a shape as of `offline`, a folder or a hub id; none: a mock executor")] = None,
    kinds: Annotated[list[str] | None, typer.Option(help="of actors to kill; may be repeated  [default: all]")] = None,
    streams: Annotated[int, typer.Option(help="at a time", min=1)] = 24,
    output: Annotated[int | None, typer.Option(help="most tokens for each; none: 6000 of a mock, 160 of a model", min=4)] = None,
    seed: Annotated[int, typer.Option(help="of who is killed, and when")] = 0,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Kill random actors under load: every stream must equal its undisturbed run. Fails if one does not; if the model is neither
    float32 nor deterministic, only if one lost or repeated something, since there it may part whenever a batch is grouped differently."""
    with reported():
        figures = asyncio.run(chaos(model, kills, streams, output, seed, kinds, **only_given(given)))
        figures["machine"] = machine()
        show("chaos", figures, as_json=as_json)
        if figures["lost"] or figures["repeated"] or (figures["diverged"] and figures["exact"]):
            raise typer.Exit(1)


@app.command("fairness")
@with_tables(EngineConfig, panels=("Engine",), skip=("model",))
def fairness_command(
    contest: Annotated[list[str] | None, typer.Option(help="slots, blocks, prefill or step; may be repeated  [default: all]")] = None,
    model: Annotated[str | None, typer.Option(help="`tiny`, a shape, a folder or a hub id; none: a mock executor with a pace")] = None,
    rounds: Annotated[int, typer.Option(help="times that the phases take turns; the median counts", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="of each phase", min=0.1)] = 5.0,
    streams: Annotated[int, typer.Option(help="of a well-behaved tenant", min=1)] = 16,
    as_json: Json = False,
    **given: Any,
) -> None:
    """What a tenant gets beside one that asks for as much, and beside one that floods the engine. Fails below nine tenths."""
    with reported():
        figures = asyncio.run(fairness(model, contest or [], rounds, seconds, streams, **only_given(given)))
        figures["machine"] = machine()
        show("fairness", figures, as_json=as_json)
        if not figures["fair"]:
            raise typer.Exit(1)


@app.command("soak")
@with_tables(EngineConfig, panels=("Engine",), skip=("model", "executor"))
def soak_command(
    requests: Annotated[int, typer.Option(min=100)] = 1_000_000,
    at_once: Annotated[int, typer.Option(help="requests in flight", min=1)] = 256,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Very many short requests through a mock executor: the engine must not grow. Fails if it does."""
    with reported():
        figures = asyncio.run(soak(requests, at_once, **only_given(given)))
        figures["machine"] = machine()
        show("soak", figures, as_json=as_json)
        if not figures["flat"] or figures["wrong"]:
            raise typer.Exit(1)
