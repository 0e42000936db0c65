"""What the gateway tells about the engine, and about a client's own requests."""

from __future__ import annotations

from typing import Any

from penstock.actors.resolve import Model
from penstock.actors.sessions import Session

_SHOWN = ("name", "digest", "max_model_len", "dtype", "kv_dtype", "deterministic")  # of the model


def list_requests(session: Session, now: float) -> list[dict[str, Any]]:
    """The client's open requests; `age` in seconds."""
    return [
        {
            "request": request.id,
            "state": request.state,
            "prompt_tokens": request.resolved.prompt_tokens if request.resolved is not None else 0,
            "generated_tokens": sum(len(entry.ids) for entry in request.entries),
            "age": now - request.arrived,
        }
        for request in session.requests.values()
        if request.state != "told"
    ]


def list_adapters(rows: tuple[dict[str, Any], ...], vitals: tuple[Any, ...]) -> list[dict[str, Any]]:
    """What the adapters actor knows by name, and of those that are wanted or on the device what the scheduler knows, at most a second
    old: `state` resident, loading or waiting; streams `running` and `waiting`; `tokens` served since it was wanted first."""
    scheduler: dict[str, Any] = next((row[6] for row in vitals if row[0] == "scheduler"), {})
    there = {digest: (state, running, waiting, tokens) for digest, state, running, waiting, tokens in scheduler.get("adapters", ())}
    names = "state", "running", "waiting", "tokens"
    return [{**row, **dict(zip(names, there.get(row.get("digest", ""), ()), strict=False))} for row in rows]


def status_report(state: str, model: Model | None, counts: dict[str, int], clients: int, vitals: tuple[Any, ...]) -> dict[str, Any]:
    """The engine's report. `counts` are the gateway's, `vitals` the supervisor's rows `[kind, index, incarnation, state, pid,
    progress, load]`, at most a second old."""
    kinds = ("scheduler", "executor", "adapters")
    scheduler, executor, adapters = (next((dict(row[6]) for row in vitals if row[0] == kind), {}) for kind in kinds)
    if scheduler.get("steps"):
        scheduler["batch_mean"] = scheduler["rows"] / scheduler["steps"]
    return {
        "state": state,
        "model": {name: getattr(model, name) for name in _SHOWN} if model is not None else {},
        "requests": {"open": counts["open"], "total": counts["requests"], "finished": counts["finished"], "failed": counts["failed"]},
        "tokens": {"generated": counts["generated_tokens"], "prompt": counts["prompt_tokens"]},
        "clients": clients,
        "chunks": counts["chunks"],
        "hand_overs": counts["hand_overs"],
        "scheduler": scheduler,
        "executor": executor,
        "adapters": adapters,
        "actors": [
            {"kind": kind, "index": index, "incarnation": incarnation, "state": state, "pid": pid, "progress": progress}
            for kind, index, incarnation, state, pid, progress, _ in vitals
        ],
    }
