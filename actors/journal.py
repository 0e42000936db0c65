"""The journal: for every open request its resolved value and what was released of it. Everything else in the engine derives from it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from penstock.actors.messages import Released
from penstock.actors.resolve import Resolved
from penstock.actors.tally import Tally

if TYPE_CHECKING:
    from penstock.actors.sessions import Session


@dataclass(slots=True, eq=False)
class Entry:
    """One stream: what was released, in pieces of whole tokens with their text, and how much of that its client was sent."""

    handle: int
    request: OpenRequest
    child: int
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
    ended: tuple[str, dict[str, Any]] | None = None  # reason, facts
    told_end: bool = False

    def release(self, count: int, ids: array[int], text: str) -> None:
        self.ids.extend(ids)
        self.counts.append(count)
        self.texts.append(text)

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
    attached: bool = True  # to the session's present connection
    left: float | None = None  # when it lost its connection, until its client asks for it again
    resolved: Resolved | None = None
    entries: list[Entry] = field(default_factory=list)
    tokenized: float = 0.0
    deadline: float | None = None
    queue_timeout: float | None = None
    told: int | None = None  # number of the Chunks message with its terminal

    @property
    def ended(self) -> bool:
        return bool(self.entries) and all(entry.ended is not None for entry in self.entries)

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


@dataclass(slots=True)
class Taken:
    """What a message of released rows brought: tokens journaled, streams that ended, and streams of which something is missing."""

    tokens: int = 0
    ends: list[tuple[Entry, str, dict[str, Any]]] = field(default_factory=list)
    gaps: list[Entry] = field(default_factory=list)


class Journal:
    """Entries by handle. The gateway's incarnation is in the upper half of a handle, so that a new one never repeats an old one."""

    def __init__(self, incarnation: int) -> None:
        self._next = incarnation << 32
        self.entries: dict[int, Entry] = {}
        self.prompt_tokens = 0  # of all open entries
        self.tally = Tally()

    def open(self, request: OpenRequest, child: int, received: array[int]) -> Entry:
        entry = Entry(self._next, request, child, received, base=len(received), sent_ids=len(received))
        self._next += 1
        self.entries[entry.handle] = entry
        if request.resolved is not None:
            self.prompt_tokens += request.resolved.prompt_tokens
            self.tally.add(request.resolved.tenant, 1, request.resolved.prompt_tokens)
        return entry

    def close(self, entry: Entry) -> None:
        """The stream has ended: rows for it are no longer taken. Its tail stays with its request until the client has it."""
        if self.entries.pop(entry.handle, None) is not None and entry.request.resolved is not None:
            self.prompt_tokens -= entry.request.resolved.prompt_tokens
            self.tally.remove(entry.request.resolved.tenant, 1, entry.request.resolved.prompt_tokens)

    def take(self, message: Released) -> Taken:
        """Journal what is fresh: of the current attempt, and from where the journal ends. Marks the entries for their clients."""
        taken = Taken()
        entries = self.entries
        ids, at = array("i", message.ids), 0
        for handle, attempt, offset, count, text in zip(
            memoryview(message.handles).cast("q").tolist(),
            memoryview(message.attempts).cast("i").tolist(),
            memoryview(message.offsets).cast("i").tolist(),
            memoryview(message.counts).cast("i").tolist(),
            message.texts,
            strict=True,
        ):
            begin, at = at, at + count
            entry = entries.get(handle)
            if entry is None or entry.attempt != attempt:
                continue
            if offset == len(entry.ids):
                entry.release(count, ids[begin:at], text)
                taken.tokens += count
                entry.request.session.mark(entry)
            elif offset > len(entry.ids):
                taken.gaps.append(entry)
        for handle, attempt, tokens in message.prompts:
            entry = entries.get(handle)
            if entry is not None and entry.attempt == attempt:
                entry.prompt_logprobs = tokens
                entry.request.session.mark(entry)
        for handle, attempt, tokens in message.details:
            entry = entries.get(handle)
            if entry is not None and entry.attempt == attempt and entry not in taken.gaps:
                entry.logprobs += tokens
        for handle, attempt, reason, facts in message.ends:
            entry = entries.get(handle)
            if entry is None or entry.attempt != attempt or entry in taken.gaps:
                continue
            if facts.get("generated", len(entry.ids)) == len(entry.ids):
                taken.ends.append((entry, reason, facts))
            else:
                taken.gaps.append(entry)  # its last rows were lost
        return taken
