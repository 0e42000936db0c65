"""A client's request, from the moment it is admitted until its client has its end for certain, and the streams of its samples.

    tokenizing ── resolved ──▶ open ── its last stream ends ──▶ ended ── its client is sent that ──▶ told ── acknowledged ──▶ over

A failed, cancelled or forgotten request is over at once. Whether its client has a connection now is another matter: see `left`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from penstock.actors.resolve import Resolved
from penstock.engine.request import Sampler

if TYPE_CHECKING:
    from penstock.actors.sessions import Session

State = Literal["tokenizing", "open", "ended", "told", "over"]


@dataclass(slots=True, eq=False)
class Entry:
    """One stream: what was released, in pieces of whole tokens with their text, and how much of that its client was sent."""

    handle: int
    request: OpenRequest
    sampler: Sampler
    ids: array[int]  # released token ids, int32
    attempt: int = 0
    base: int = 0  # ids that the client brought along; there are no pieces of them
    counts: list[int] = field(default_factory=list)  # tokens of each piece
    texts: list[str] = field(default_factory=list)  # text of each piece
    logprobs: list[Any] = field(default_factory=list)  # of each token after `base`, if asked for
    prompt_logprobs: list[Any] | None = None
    told_prompt: bool = False
    sent_pieces: int = 0
    sent_ids: int = 0
    stream: int = 0  # its number on the client's connection
    unadapted: bool = False  # its adapter was not where it had been, and is looked for
    ended: tuple[str, dict[str, Any]] | None = None  # reason, facts
    told_end: bool = False

    def release(self, count: int, ids: array[int], text: str) -> None:
        self.ids.extend(ids)
        self.counts.append(count)
        self.texts.append(text)

    def complete(self) -> str | None:
        """Why a stream that its client brought along is at its end already, if it is."""
        if len(self.ids) >= self.request.value.limit:
            return "length"
        return "stop" if self.ids and self.ids[-1] in self.sampler.stop_ids else None

    def rewind(self, received: array[int]) -> bool:
        """Send again from where a client says it is. False if it holds something else than what was released."""
        if self.ids[: len(received)] != received or len(received) < self.base:
            return False
        at, piece = self.base, 0
        while at < len(received):
            at += self.counts[piece]
            piece += 1
        if at != len(received):
            return False
        self.sent_pieces, self.sent_ids, self.told_end, self.told_prompt = piece, at, False, False
        return True


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A client's request, with an entry for each of its `n` samples."""

    id: str
    session: Session
    arrived: float
    streams: int = 1  # its samples
    deadline: float | None = None
    queue_timeout: float | None = None
    job: int | None = None  # of who tokenizes its prompt, or finds its adapter
    resolved: Resolved | None = None
    adapter: tuple[Any, ...] = ()  # where it is: see `messages.Found`
    adapter_token: str | None = field(default=None, repr=False)
    losses: int = 0  # of the adapter, from where it was, since so many tokens were `made`
    made: int = 0
    received: list[array[int]] = field(default_factory=list)  # ids of each stream that its client brought along
    tokenized: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    left: float | None = None  # since when its client's connection does not know it: it has to ask for it again
    over: bool = False

    @property
    def value(self) -> Resolved:
        """Of one that is not tokenizing any more."""
        if self.resolved is None:
            raise RuntimeError("the request is not resolved yet")
        return self.resolved

    @property
    def state(self) -> State:
        if self.over:
            return "over"
        if not self.entries:
            return "tokenizing"
        if any(entry.ended is None for entry in self.entries):
            return "open"
        return "told" if self.left is None and all(entry.told_end for entry in self.entries) else "ended"

    def end(self) -> None:
        """Nothing is kept of it. Entries and request know each other: without this, they would wait for the garbage collector."""
        self.over = True
        self.entries.clear()
        self.received.clear()

    def usage(self, now: float) -> dict[str, Any]:
        """Tokens, and seconds at each hop, of the whole request."""
        facts = [entry.ended[1] for entry in self.entries if entry.ended is not None]
        return {
            "prompt_tokens": self.resolved.prompt_tokens if self.resolved is not None else 0,
            "cached_tokens": sum(fact.get("cached_tokens", 0) for fact in facts),
            "generated_tokens": sum(len(entry.ids) for entry in self.entries),
            "preemptions": sum(fact.get("preemptions", 0) for fact in facts),
            "tokenize_s": max(0.0, self.tokenized - self.arrived),
            **{name: max((fact.get(name, 0.0) for fact in facts), default=0.0) for name in ("queue_s", "prefill_s", "decode_s")},
            "total_s": now - self.arrived,
        }
