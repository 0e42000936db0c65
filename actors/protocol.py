"""What a client and the gateway say to each other, version 1: specified in clients/PROTOCOL.md.

Columns are little-endian buffers (`bytes`), one message for any number of streams. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.actors.wire import Catalogue


@dataclass(frozen=True, slots=True)
class Hello:
    """A client introduces itself. `client` is its own unique id, kept across reconnects: requests belong to it. `name` is for people."""

    client: str
    name: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """The engine is ready. `engine` changes with each gateway incarnation. A client sends something at least every `lease` seconds,
    or its requests end. At most `window` `Chunks` may be unacknowledged."""

    engine: str
    model: dict[str, Any]
    limits: dict[str, Any]
    lease: float
    window: int


@dataclass(frozen=True, slots=True)
class Generate:
    """One request. Exactly one of `prompt`, `messages` and `ids` (int32) is given, or `resume`. `request` is the client's own id, unique
    among its open requests. `params` and `options` are the tables SamplingParams and PromptOptions. `deadline` and `queue_timeout`
    are seconds from now. `resume` is what a former `Accepted` returned as `resolved`, with `received`: for each stream the ids (int32)
    that the client already has. `adapter` is a name or source, or a map (see PROTOCOL.md); `adapter_token` is what its source wants."""

    request: str
    prompt: str | None
    messages: tuple[Any, ...] | None
    ids: bytes | None
    params: dict[str, Any]
    options: dict[str, Any]
    adapter: str | dict[str, Any] | None
    priority: int
    tenant: str
    deadline: float | None
    queue_timeout: float | None
    resume: dict[str, Any] | None
    adapter_token: str | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is admitted. `streams` are the numbers under which its `n` samples appear in `Chunks`, on this connection."""

    request: str
    streams: tuple[int, ...]
    resolved: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chunks:
    """News of any number of streams. Row i: `streams[i]` gained `counts[i]` tokens, which are the next `counts[i]` of `ids`, and
    `texts[i]`. `details` are `[stream, tokens]`, for streams that asked for log-probabilities. `ends` are `[stream, reason, facts]`,
    the last news of a stream; `done` are `[request, usage]`, the last of a request. `number` counts these messages from 1."""

    number: int
    streams: bytes
    counts: bytes
    ids: bytes
    texts: tuple[str, ...]
    details: tuple[Any, ...]
    ends: tuple[Any, ...]
    done: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that ended, or never began, with an error; or, with no `request`, a message that was not understood."""

    request: str | None
    error: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these requests of this client. Unknown ids are ignored: cancelling twice is harmless."""

    requests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Renew:
    """Renews the lease, and acknowledges all `Chunks` up to `received`."""

    received: int


@dataclass(frozen=True, slots=True)
class List:
    query: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The client's open requests, a map each: request, state, prompt_tokens, generated_tokens, age."""

    query: int
    requests: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Status:
    query: int


@dataclass(frozen=True, slots=True)
class Report:
    query: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Control:
    """An operator's order: `drain`, or `restart` for the actor of this name, if it is still the start of it that had the number
    `incarnation`: so an order may be said again. Answered by a `Report`, with nothing but an `error` if it is refused."""

    query: int
    order: str
    actor: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Adapters:
    """What adapters are known by name (`list`), and an operator's orders: `load` what is at `source` under `name`, or again what is known
    by it; `unload`, `pin`, `unpin`. Answered by a `Report` with `adapters`, a map each, when it is done, or with an `error`."""

    query: int
    order: str
    name: str
    source: str | None
    token: str | None


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The client leaves: its requests end now. From the gateway: the connection is not known there (any more); say Hello again."""


TO_GATEWAY = Catalogue({1: Hello, 2: Generate, 3: Cancel, 4: Renew, 5: List, 6: Status, 7: Goodbye, 8: Control, 9: Adapters})
TO_CLIENT = Catalogue({1: Welcome, 2: Accepted, 3: Chunks, 4: Failed, 5: Listing, 6: Report, 7: Goodbye})
