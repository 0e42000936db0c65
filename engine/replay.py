"""Run a recording: the same scheduler, the same calls, and nothing else. No model, no sockets, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.engine.recorder import Call
from penstock.engine.recording import COLUMNS, Recording, columns
from penstock.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Replayed:
    """`steps` plans were the recorded ones, byte for byte. `difference` says what was not, at the last of `calls` calls; none: all was
    the same. `raised` is the last exception that the scheduler raised then and now: of a crash, usually the reason."""

    calls: int
    steps: int
    difference: str | None
    raised: str | None


def replay(recording: Recording) -> Replayed:
    """Make every call again, until an answer differs. This uses the recording up."""
    scheduler, steps, raised = recording.scheduler, 0, None
    for number, call in enumerate(recording.calls, 1):
        answer, error = None, None
        try:
            answer = _make(scheduler, call, text=recording.text)
        except Exception as caught:  # noqa: BLE001  whatever it raised when it was recorded is what this is about
            error = f"{type(caught).__name__}: {caught}"
        difference = _compare(call, answer, error)
        if difference is not None:
            return Replayed(number, steps, difference, raised)
        steps += answer is not None
        raised = error or raised
    return Replayed(len(recording.calls), steps, None, raised)


def _make(scheduler: Scheduler, call: Call, *, text: bool) -> dict[str, Any] | None:
    """One call; of a plan, its columns."""
    match call.kind:
        case "submit":
            scheduler.submit(call.value, call.now)
            # They stand for the ids: the scheduler takes a digest that is there, and asks for none that was not asked for then.
            scheduler._streams[call.value.handle].digests[:] = call.answer
        case "abort":
            scheduler.abort(call.value[0], call.now, call.value[1])
        case "expire":
            scheduler.expire(call.now)
        case "loaded":
            scheduler.loaded(call.value, call.now)
        case "lost":
            scheduler.lost(call.value, call.now)
        case "pin":
            scheduler.pin(call.value, call.now)
        case "unpin":
            scheduler.unpin(call.value)
        case "commit":
            scheduler.commit(call.value, call.now)
        case "plan":
            plan = scheduler.plan(call.now)
            return None if plan is None else dict(zip(COLUMNS, columns(plan, text=text), strict=True))
    return None


def _compare(call: Call, answer: dict[str, Any] | None, error: str | None) -> str | None:
    if error is not None and call.done:
        return f"`{call.kind}` raised {error}, and did not when it was recorded"
    if error is None and not call.done:
        return f"`{call.kind}` raised when it was recorded, and does not here"
    if call.kind != "plan" or call.answer == answer:
        return None
    if call.answer is None or answer is None:
        return f"recorded {_name(call.answer)}, here {_name(answer)}"
    name = next(name for name in COLUMNS if call.answer[name] != answer[name])
    return f"{_name(call.answer)} has other `{name}`: recorded {_shown(call.answer[name], name)}, here {_shown(answer[name], name)}"


def _name(answer: dict[str, Any] | None) -> str:
    return "no plan" if answer is None else f"step {answer['step']}"


def _shown(column: Any, name: str) -> str:
    dtype = np.bool_ if name == "samples" else np.int32
    if isinstance(column, bytes) and len(column) % np.dtype(dtype).itemsize == 0:
        return np.array2string(np.frombuffer(column, dtype), threshold=20)
    return repr(column)[:200]
