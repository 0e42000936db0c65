"""The state of a scheduler at one moment, taken fast enough to be taken while it runs.

What changes is copied, and what never does is shared: requests, launched steps, digests, numbers. So a snapshot costs about a
microsecond a stream, and turning it into bytes can wait until somebody wants them. It is made attribute by attribute from what the
classes below really have; a field that is added to one of them is taken without a change here, and a class that is not among them is
refused by `engine.recording` instead of being left out silently.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from penstock.engine.blocks import BlockPool
from penstock.engine.commit import Counters
from penstock.engine.deadlines import Deadlines
from penstock.engine.lora.residency import Residency, Resident
from penstock.engine.prefix import Prefixes
from penstock.engine.queue import FairQueue, Level, Line
from penstock.engine.room import Room
from penstock.engine.scheduler import Scheduler
from penstock.engine.slots import Shares, Slots
from penstock.engine.stream import Stream
from penstock.engine.turns import Turns

PARTS: tuple[type[Any], ...] = (  # what changes
    BlockPool, Counters, Deadlines, FairQueue, Level, Line, Prefixes, Residency, Resident, Room, Scheduler, Shares, Slots, Turns,
)  # fmt: skip
CONTAINERS: tuple[type[Any], ...] = (list, deque, dict, OrderedDict)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """`scheduler` is a copy in which streams are still the live ones. What those were that were open is in `columns`, by attribute, and
    `at` is the place in them by the `id` of the live one. Streams that are not there were gone, and change no more."""

    scheduler: Scheduler
    at: dict[int, int]
    columns: dict[str, list[Any]]

    def of(self, stream: Stream) -> dict[str, Any]:
        """The attributes of a stream at that moment. Its digests are all that it ever had: the list only grows, and what it has grown to
        is what a replay asks of it."""
        at = self.at.get(id(stream))
        now = {name: getattr(stream, name) if at is None else column[at] for name, column in self.columns.items()}
        return now | {"blocks": list(now["blocks"])}


def take(scheduler: Scheduler, *, text: bool) -> Snapshot:
    """A snapshot; `text` takes the token ids of running streams too, and not only what decides about plans."""
    copy: Scheduler = _copy(scheduler, Scheduler, {}, text)
    streams = scheduler._streams.values()
    # A list for each attribute, and not a row for each of thousands of streams: the garbage collector looks at every row.
    columns: dict[str, list[Any]] = {name: list(map(attrgetter(name), streams)) for name in attributes(Stream, None)}
    columns["blocks"] = list(map(tuple, columns["blocks"]))
    columns["prompt_parts"] = [()] * len(streams)  # megabytes, and they say nothing about plans
    return Snapshot(copy, dict(zip(map(id, streams), range(len(streams)), strict=True)), columns)


def attributes(kind: type[Any], part: object) -> list[str]:
    """The names of all that a part has. A subclass may keep what is no state in slots of its own."""
    return list(kind.__slots__ if "__slots__" in vars(kind) else vars(part))


def _copy(part: Any, kind: type[Any], copies: dict[int, Any], text: bool) -> Any:
    twin = copies[id(part)] = object.__new__(kind)
    for name in attributes(kind, part):
        value = getattr(part, name)
        if kind is Slots and name == "tokens":  # by far the largest, and nothing beyond `known` is ever read
            value = value[:, : int(part.known.max()) if text else 0]
        setattr(twin, name, _copied(value, copies, text))
    return twin


def _copied(value: Any, copies: dict[int, Any], text: bool) -> Any:
    kind = type(value)
    if kind is np.ndarray:
        return value.copy()
    if kind in PARTS:
        return copies[id(value)] if id(value) in copies else _copy(value, kind, copies, text)
    if kind not in CONTAINERS:
        return value
    first = type(next(iter(value.values() if isinstance(value, dict) else value), None))
    if first not in PARTS and first not in CONTAINERS:  # one look is enough: no container mixes what changes with what does not
        return value.copy()
    if isinstance(value, dict):
        return kind((key, _copied(entry, copies, text)) for key, entry in value.items())
    return kind(_copied(entry, copies, text) for entry in value)
