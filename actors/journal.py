"""The journal: for every open request its resolved value and what was released of it. Everything else in the engine derives from it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from penstock.actors.messages import Released
from penstock.actors.request import Entry, OpenRequest
from penstock.actors.tally import Tally
from penstock.engine.request import Sampler


@dataclass(slots=True)
class Taken:
    """What a message of released rows brought: tokens journaled, streams that ended, and streams of which something is missing."""

    tokens: int = 0
    ends: list[tuple[Entry, str, dict[str, Any]]] = field(default_factory=list)
    gaps: dict[Entry, None] = field(default_factory=dict)  # in order


class Journal:
    """Entries by handle. The gateway's incarnation is in the upper half of a handle, so that a new one never repeats an old one."""

    def __init__(self, incarnation: int) -> None:
        self._next = incarnation << 32
        self.entries: dict[int, Entry] = {}
        self.prompt_tokens = 0  # of all open entries
        self.tally = Tally()

    def open(self, request: OpenRequest, sampler: Sampler, received: array[int]) -> Entry:
        entry = Entry(self._next, request, sampler, received, base=len(received), sent_ids=len(received))
        self._next += 1
        self.entries[entry.handle] = entry
        self.prompt_tokens += request.value.prompt_tokens
        self.tally.add(request.value.tenant, 1, request.value.prompt_tokens)
        return entry

    def close(self, entry: Entry) -> None:
        """The stream has ended: rows for it are no longer taken. Its tail stays with its request until the client has it."""
        if self.entries.pop(entry.handle, None) is not None:
            self.prompt_tokens -= entry.request.value.prompt_tokens
            self.tally.remove(entry.request.value.tenant, 1, entry.request.value.prompt_tokens)

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
                taken.gaps[entry] = None
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
                taken.gaps[entry] = None  # its last rows were lost
        return taken
