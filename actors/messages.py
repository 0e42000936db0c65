"""What the actors say to each other. What a client says and hears is in `protocol`.

Columns are little-endian buffers (`bytes`): one message a step whatever the number of rows. `handle` is the integer under which the
gateway keeps a request (its high 32 bits are the gateway's incarnation), `attempt` counts how often it was handed over; a row is
fresh only if both are current. Times are seconds; those that are points in time are on the machine's monotonic clock.

    client  ══ Hello, Generate, Cancel, Renew, List, Status, Control ══▶ gateway ══ Welcome, Accepted, Chunks, Failed, … ══▶ client
    gateway ── Encode ──▶ tokenizer ── Encoded ──▶ gateway ── Submit, Abort ──▶ scheduler ── Begin ──▶ gateway
    gateway ── Find, Leave, Manage ──▶ adapters ── Found, Managed ──▶ gateway; adapters ── Pin ──▶ scheduler
    scheduler ── Step, Load ──▶ executor ── StepDone, Loaded ──▶ scheduler
    scheduler ── Emitted ──▶ detokenizer ── Released ──▶ gateway ── Journaled ──▶ scheduler
    every actor ── Up, Ready, Heartbeat, Died, Order ──▶ supervisor ── Peers, Vitals, Drain, Record, Stop ──▶ every actor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.actors.wire import Catalogue


@dataclass(frozen=True, slots=True)
class Up:
    """An actor listens at `address`."""

    kind: str
    index: int
    incarnation: int
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """An actor can do its job. `facts` are what others need to know of it, such as the model's vocabulary or the number of KV blocks."""

    kind: str
    index: int
    incarnation: int
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Proof of progress: `progress` grows with the work done (steps, messages). `load` is for the status report."""

    kind: str
    index: int
    incarnation: int
    progress: int
    load: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Died:
    """An actor cannot go on. `error` is a typed error; it exits right after."""

    kind: str
    index: int
    incarnation: int
    error: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Peers:
    """Who is there: `[kind, index, incarnation, address, ready, facts]` each. Sent to all whenever it changes."""

    peers: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Vitals:
    """The supervisor's view, once a second, to the gateway for status reports: `[kind, index, incarnation, state, pid, progress, load]`."""

    actors: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Let what is open finish, take nothing new. The gateway answers with `Ready(facts={"drained": True})` when nothing is open."""


@dataclass(frozen=True, slots=True)
class Order:
    """From the gateway: what an operator wants, as in `Control`; `by` is who that is, for the log."""

    order: str
    kind: str
    index: int
    incarnation: int
    by: str


@dataclass(frozen=True, slots=True)
class Record:
    """To the scheduler: write down what the flight recorder holds."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End now, in order."""


@dataclass(frozen=True, slots=True)
class Encode:
    """To a tokenizer: turn `prompt` or `messages` into ids. `words` are bad words given as text. The gateway's incarnation is in the
    upper half of `job`."""

    job: int
    prompt: str | None
    messages: tuple[Any, ...] | None
    options: dict[str, Any]
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """`ids` int32; `words` one tuple of ids for each variant of each bad word; or an `error`."""

    job: int
    ids: bytes
    words: tuple[Any, ...]
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Find:
    """To the adapters actor: have an adapter ready. `wish` is what a client asked for (`engine.lora.recipe`), `token` its key to the
    source; `digest` what it was when the request began, if it has. The gateway's incarnation is in the upper half of `job`."""

    job: int
    wish: dict[str, Any]
    token: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """It is at `place`, `[digest, pages, path]`: BLAKE2b of its content, how many pages it takes, and the file that has them; or an
    `error`."""

    job: int
    place: tuple[Any, ...]
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Leave:
    """To the adapters actor: nobody waits for the answer to this `job` any more."""

    job: int


@dataclass(frozen=True, slots=True)
class Manage:
    """To the adapters actor, from an operator: `load` a `source` under a `name`, `unload` it, `pin` or `unpin` it, `list` all."""

    job: int
    order: str
    name: str
    source: str | None
    token: str | None


@dataclass(frozen=True, slots=True)
class Managed:
    """What the adapters actor has: a map for each name; or an `error`."""

    job: int
    adapters: tuple[Any, ...]
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Pin:
    """To the scheduler: the adapters that are to stay on the device, all of them: `[digest, pages, path]` each, and `kept`, the digests of
    those of which it is not known yet where they are. Whoever has one of these keeps it."""

    places: tuple[Any, ...]
    kept: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """To the executor: put the adapter in the file `path` into `pages`. `number` is engine.lora.residency.Load's. Plans sent before may
    still read what is there, none after does before `Loaded`."""

    scheduler: int
    executor: int
    number: int
    path: str
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """That is done, or has failed."""

    scheduler: int
    executor: int
    number: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Submit:
    """The value of a request, from `HandOver.give`. `sampler` is engine.request.Sampler as a map; `decode` is for the detokenizer and
    passes through the scheduler unread. `prompt` and `generated` are int32. `adapter` is a place as in `Found`; empty: the base model."""

    handle: int
    attempt: int
    prompt: bytes
    generated: bytes
    limit: int
    sampler: dict[str, Any]
    decode: dict[str, Any]
    priority: int
    tenant: str
    salt: bytes
    deadline: float | None
    queue_timeout: float | None
    adapter: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """End these streams (`handles` int64), if they are of these `attempts` (int32; 0: whichever they are of)."""

    handles: bytes
    attempts: bytes


@dataclass(frozen=True, slots=True)
class Begin:
    """The scheduler holds nothing, or lost a peer it depends on: hand everything over (again). If an executor died, `flying` are the
    handles (int64) of the streams that were in a launched step of it."""

    incarnation: int
    flying: bytes


@dataclass(frozen=True, slots=True)
class Step:
    """engine.plan.StepPlan on the wire; `fills` are `[slot, prompt_tokens, sampler map, history, pages]`. `scheduler` and
    `executor` are the incarnations that this plan is from and for."""

    scheduler: int
    executor: int
    step: int
    fills: tuple[Any, ...]
    table_slots: bytes
    table_columns: bytes
    table_blocks: bytes
    slots: bytes
    starts: bytes
    counts: bytes
    decodes: int
    samples: bytes
    tokens: bytes


@dataclass(frozen=True, slots=True)
class StepDone:
    """engine.plan.StepResult on the wire; log-probabilities are `[k + 1, rows, ids, values, ranks]`."""

    scheduler: int
    executor: int
    step: int
    ids: bytes
    logprobs: tuple[Any, ...] | None
    prompt_logprobs: tuple[Any, ...] | None
    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one step of the `scheduler` (its incarnation) produced for one detokenizer; `number` counts these messages to it from 1, anew
    after each Begin. `opens` are
    `[handle, attempt, decode map, prompt, generated]`, streams that begin; then the rows: token `ids[i]` (int32) of `handles[i]`
    (int64) at `offsets[i]` (int32) of its generated tokens; then `ends`, `[handle, attempt, reason, facts]`. `details` are
    `[row, token]`, `prompts` are `[handle, attempt, tokens]` (log-probabilities)."""

    scheduler: int
    number: int
    opens: tuple[Any, ...]
    handles: bytes
    attempts: bytes
    offsets: bytes
    ids: bytes
    ends: tuple[Any, ...]
    details: tuple[Any, ...]
    prompts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Released:
    """Text and ids that may be shown, of the scheduler's message `number` to the detokenizer `index`. Row i: `counts[i]` ids from
    `offsets[i]` on of `handles[i]`, and `texts[i]` (a row of no ids is the prompt's text, for an echo). `details` are
    `[handle, attempt, tokens]`; `ends` and `prompts` as in `Emitted`."""

    index: int
    number: int
    handles: bytes
    attempts: bytes
    offsets: bytes
    counts: bytes
    ids: bytes
    texts: tuple[str, ...]
    ends: tuple[Any, ...]
    details: tuple[Any, ...]
    prompts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Journaled:
    """The gateway has taken all that the scheduler sent to the detokenizer `index`, up to its message `number`."""

    index: int
    number: int


INSIDE = Catalogue(
    {
        1: Up, 2: Ready, 3: Heartbeat, 4: Died, 5: Peers, 6: Vitals, 7: Drain, 8: Stop, 9: Record, 10: Order,
        20: Encode, 21: Encoded, 22: Submit, 23: Abort, 24: Begin, 25: Step, 26: StepDone, 27: Emitted, 28: Released, 29: Journaled,
        30: Find, 31: Found, 32: Manage, 33: Managed, 34: Pin, 35: Load, 36: Loaded,
        37: Leave,
    }
)  # fmt: skip
