"""`penstock bench chaos`: actors are killed at random moments under load, and every stream must equal its undisturbed run.

Who is killed, and when, is random: one actor, two at once, or a second one while the first is being replaced.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.load import Load, Watch, mixed
from penstock.clients.bench.measure import percentile
from penstock.clients.bench.offline import engine
from penstock.clients.bench.verdict import DIVERGED, LOST, REPEATED, TIED
from penstock.clients.errors import InvalidRequest, PenstockError, UnknownAdapter

KINDS = ("executor", "scheduler", "tokenizer", "detokenizer", "gateway", "adapters")  # the last only where there are any
PATIENCE_S = 300.0  # for an engine to be whole again: a large model has to be loaded anew
_LOOK_S = 0.1
_LATER_S = 0.6  # a second kill comes within this time, if the first one's victim is to be still away


@dataclass(frozen=True, slots=True)
class Blow:
    """Kills that belong together: their kinds, and how long each stream that was open took to its next token."""

    kinds: tuple[str, ...]
    watches: list[Watch]

    @property
    def seconds(self) -> list[float]:
        return [watch.seconds for watch in self.watches if watch.seconds is not None]


async def chaos(
    model: str | None, kills: int, streams: int, output: int | None, seed: int, kinds: list[str] | None = None, **config: Any
) -> dict[str, Any]:
    """At least `kills` kills, of actors of these `kinds` (none: of all), while `streams` streams of at most `output` tokens run; of a mock
    executor if no `model` is named. A `model` may be a shape, too: see `offline.engine`."""
    mock = model is None
    config = {"tokenizers": 2, "detokenizers": 2, **({"executor": "mock"} if mock else {}), **config}
    for kind in kinds or ():
        if kind not in KINDS:
            limit = ", ".join(KINDS)
            raise InvalidRequest(f"kinds={kind!r}: must be {limit}", field="kinds", value=kind, limit=limit)
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as folder:
        log = Path(config.setdefault("log_file", str(Path(folder) / "log.jsonl")))
        async with engine(model or "tiny", **config) as (client, _):
            vocab, status = int(client.model["vocab_size"]), await client.status()
            dtype, deterministic = status["model"]["dtype"], status["model"]["deterministic"]
            present = {row["kind"] for row in status["actors"]}
            adapters = [] if mock else await known_adapters(client)
            # Without log-probabilities there are no ties.
            orders = mixed(streams, output or (6000 if mock else 160), vocab, adapters, logprobs=not deterministic)
            load = Load(client, orders, vocab, exact=deterministic or dtype == "float32")
            await load.measure()
            parting = await load.part()
            begun = time.perf_counter()
            with load.running() as tasks:
                blows = await _kill(client, load, kills, random.Random(seed), present, kinds)
            await tasks
            seconds = time.perf_counter() - begun
            report = await idle(client)
            strange = _strange_deaths(log)
    return {
        "kills": sum(len(blow.kinds) for blow in blows), "streams": sum(load.verdicts.values()), "lost": load.verdicts[LOST],
        "repeated": load.verdicts[REPEATED], "diverged": load.verdicts[DIVERGED], "ties": load.verdicts[TIED],
        "exact": load.exact, "dtype": dtype, "deterministic": deterministic, "parting_undisturbed": parting,
        **_recovery("recovery", [second for blow in blows for second in blow.seconds]),
        "recovery": {kind: _recovery("", [second for blow in blows if blow.kinds == (kind,) for second in blow.seconds]) for kind in KINDS},
        "blows": [list(blow.kinds) for blow in blows], "open_streams": [len(blow.seconds) for blow in blows],
        "recovery_first_s": [min(blow.seconds, default=None) for blow in blows],
        "recovery_last_s": [max(blow.seconds, default=None) for blow in blows],
        "killed": {kind: sum(blow.kinds.count(kind) for blow in blows) for kind in KINDS if kind in present},
        "together": sum(len(blow.kinds) > 1 for blow in blows), "strange_deaths": strange, "odd": load.odd,
        "open": report["requests"]["open"],
        "blocks_held": report["scheduler"]["blocks_total"] - report["scheduler"]["blocks_free"],
        "seconds": seconds, "model": model or "mock", "seed": seed, "config": config,
    }  # fmt: skip


async def idle(client: AsyncClient, seconds: float = PATIENCE_S) -> dict[str, Any]:
    """The status of an engine that has nothing to do and holds nothing; after `seconds` the status that it has."""
    end = time.monotonic() + seconds
    while True:
        report = await client.status()
        scheduler, busy = report["scheduler"], report["requests"]["open"]
        if scheduler and not (busy or scheduler["running"] or scheduler["waiting"] or scheduler["blocks_free"] < scheduler["blocks_total"]):
            return report
        if time.monotonic() > end:
            return report
        await asyncio.sleep(_LOOK_S)


async def known_adapters(client: AsyncClient) -> list[str]:
    """Names; none of an engine that serves no adapters."""
    try:
        return [row["name"] for row in await client.adapters()]
    except UnknownAdapter:
        return []


async def _kill(client: AsyncClient, load: Load, kills: int, draw: random.Random, present: set[str], kinds: list[str] | None) -> list[Blow]:
    choice = tuple(kinds or (kind for kind in KINDS if kind in present))
    blows: list[Blow] = []
    gone: dict[tuple[str, int], int] = {}  # whom the last blow met, and which incarnation that was
    done = 0
    while done < kills:
        crew = await _whole(client, present, gone)
        await asyncio.sleep(draw.uniform(0, 0.4))
        style = draw.choices(("one", "two", "later"), (70, 15, 15))[0]
        chosen = draw.sample(choice, 1 if style == "one" or len(choice) == 1 else 2)
        victims = [draw.choice([row for row in crew if row["kind"] == kind]) for kind in chosen]
        watches = load.watch()
        for row in victims:
            if style == "later" and row is not victims[0]:
                await asyncio.sleep(draw.uniform(0, _LATER_S))
            os.kill(row["pid"], signal.SIGKILL)
        gone = {(row["kind"], row["index"]): row["incarnation"] for row in victims}
        blows.append(Blow(tuple(chosen), watches))
        done += len(chosen)
    await _whole(client, present, gone)
    return blows


async def _whole(client: AsyncClient, present: set[str], gone: Mapping[tuple[str, int], int]) -> list[dict[str, Any]]:
    """The actors, once all that are to be `present` are ready and those of `gone` have been replaced. Raises `PenstockError` if that takes
    too long."""
    end = time.monotonic() + PATIENCE_S
    while True:
        crew: list[dict[str, Any]] = (await client.status())["actors"]
        now = {(row["kind"], row["index"]): row for row in crew}
        replaced = all(key in now and now[key]["incarnation"] > incarnation for key, incarnation in gone.items())
        if replaced and {row["kind"] for row in crew} == present and all(row["state"] == "ready" for row in crew):
            return crew
        if time.monotonic() > end:
            raise PenstockError(f"the engine was not whole again after {PATIENCE_S:g} s: {crew}")
        await asyncio.sleep(_LOOK_S)


def _recovery(name: str, seconds: list[float]) -> dict[str, float | None]:
    prefix = f"{name}_" if name else ""
    return {f"{prefix}p50_s": percentile(seconds, 50), f"{prefix}p99_s": percentile(seconds, 99)}


def _strange_deaths(log: Path) -> list[str]:
    """How actors died that nobody killed."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    died = [line for line in lines if line["event"] == "actor died" and not line["why"].endswith("died: killed by SIGKILL")]
    return [f"{line['kind']}: {line['death']}: {line['why']}" for line in died]
