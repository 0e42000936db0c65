"""The streams that are running, as columns indexed by slot.

Everything that happens to every running stream in every step happens here, on whole columns. Of a slot's tokens, `known` are on the
host, `length` counts those in flight too, and `computed` have their keys and values in a launched step, `held` fit its blocks:

    prefilling   computed < length = known
    decoding     computed = length - 1, and so each step computes one token and samples the next
    waiting      computed = length - 1, and length = total: nothing is left to launch, only results to wait for

A *stay* is one stream's time in one slot. Its number is unique, so a result that comes late tells by it whether the slot still has
the occupant that it was for.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engine.plan import Int32
from penstock.engine.request import Tokens
from penstock.engine.stream import NOWHERE, Stream

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
NO_PRIORITY = 2**62  # of an empty slot: above any other


class Slots:
    """Fill, launch, take results, leave."""

    def __init__(self, slots: int, block_size: int, max_model_len: int) -> None:
        self.size = slots
        self.block_size = block_size
        self.free = list(range(slots - 1, -1, -1))
        self.prefilling: list[Stream] = []  # in order of admission
        self.shares = Shares(slots)
        self.streams: npt.NDArray[Any] = np.full(slots, None, object)  # Stream or None
        self.stays = np.full(slots, NOWHERE, np.int64)
        self.handles = np.zeros(slots, np.int64)
        self.attempts = np.zeros(slots, np.int32)
        self.prompts = np.zeros(slots, np.int32)
        self.first = np.zeros(slots, np.int32)  # value of `known` at the first token of this stay
        self.known = np.zeros(slots, np.int32)
        self.length = np.zeros(slots, np.int32)
        self.computed = np.zeros(slots, np.int32)
        self.held = np.zeros(slots, np.int32)
        self.total = np.zeros(slots, np.int32)
        self.published = np.zeros(slots, np.int32)  # blocks offered to the prefix index
        self.decoding = np.zeros(slots, np.bool_)
        self.priority = np.full(slots, NO_PRIORITY, np.int64)
        self.number = np.zeros(slots, np.int64)
        self.share = np.zeros(slots, np.int64)
        self.adapter = np.zeros(slots, np.int64)  # its number among those that run
        self.ran = np.zeros(slots, np.int64)  # the step that it was in last
        self.stops = np.full((slots, 4), -1, np.int32)
        self.tokens = token_room(slots, max_model_len)
        self._next_stay = 0

    # ── who is here ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def running(self) -> int:
        return self.size - len(self.free)

    def at(self, slots: npt.NDArray[Any]) -> list[Stream]:
        """The streams in these slots."""
        streams: list[Stream] = self.streams[slots].tolist()
        return streams

    def occupants(self) -> list[Stream]:
        """Every stream that has a slot."""
        return self.at(np.flatnonzero(self.stays != NOWHERE))

    def below(self, priority: int) -> list[Stream]:
        """Every stream of a lower priority."""
        return self.at(np.flatnonzero(self.priority < priority))

    def lowest(self) -> Stream:
        """Who yields first: of the lowest priority, the newest of those whose tenant holds the most blocks."""
        candidates = np.flatnonzero(self.priority == self.priority.min())
        if len(self.shares) > 1:
            blocks = np.bincount(self.share[candidates], weights=self.held[candidates])
            candidates = candidates[blocks[self.share[candidates]] == blocks.max()]
        return self._newest(candidates)

    def holdings(self, priority: int) -> dict[str, list[Stream]]:
        """The streams of each tenant at this priority, the newest first."""
        slots = np.flatnonzero(self.priority == priority)
        held: dict[str, list[Stream]] = {}
        for stream in self.at(slots[np.argsort(-self.number[slots])]):
            held.setdefault(stream.tenant, []).append(stream)
        return held

    def in_turn(self, slots: Int64, count: int) -> Int64:
        """Those `count` of these slots that did not run for longest."""
        return np.sort(slots[np.argsort(self.ran[slots], kind="stable")[:count]])

    def _newest(self, slots: Int64) -> Stream:
        stream: Stream = self.streams[slots[self.number[slots].argmax()]]
        return stream

    def known_tokens(self, stream: Stream) -> Tokens:
        """The tokens of a stream that are on the host; a view."""
        return self.tokens[stream.slot, : self.known[stream.slot]]

    def certain(self, slots: npt.NDArray[Any] | int) -> npt.NDArray[Any]:
        """How many tokens of each of these slots are known and have their keys and values in a launched step."""
        return np.asarray(np.minimum(self.known[slots], self.computed[slots]))

    # ── coming and leaving ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def fill(self, stream: Stream, cached_blocks: int, adapter: int) -> None:
        """Give a stream, which has its blocks, a free slot. The first `cached_blocks` of them hold what they should already. `adapter` is
        the number of its adapter."""
        slot = stream.slot = self.free.pop()
        stream.stay = self._next_stay
        self._next_stay += 1
        self.prefilling.append(stream)
        request, known = stream.request, len(stream.tokens)
        self.streams[slot] = stream
        self.stays[slot] = stream.stay
        self.handles[slot], self.attempts[slot] = request.handle, request.attempt
        self.prompts[slot], self.total[slot] = len(request.prompt), stream.total
        self.first[slot] = self.known[slot] = self.length[slot] = known
        self.computed[slot], self.held[slot] = cached_blocks * self.block_size, len(stream.blocks) * self.block_size
        self.published[slot] = cached_blocks
        self.priority[slot], self.number[slot], self.ran[slot] = stream.priority, stream.number, 0
        self.share[slot], self.adapter[slot] = self.shares.enter(stream.priority, stream.tenant), adapter
        self.tokens[slot, :known] = stream.tokens
        stops = request.sampler.stop_ids
        if len(stops) > self.stops.shape[1]:
            self.stops = np.pad(self.stops, ((0, 0), (0, len(stops) - self.stops.shape[1])), constant_values=-1)
        self.stops[slot] = -1
        self.stops[slot, : len(stops)] = stops

    def leave(self, stream: Stream) -> None:
        """Take a stream's slot away. What it knows moves back into it, and so does the number of its results still in flight."""
        slot = stream.slot
        stream.tokens = self.known_tokens(stream).copy()
        stream.in_flight = int(self.length[slot] - self.known[slot])
        if stream in self.prefilling:
            self.prefilling.remove(stream)
        stream.slot = NOWHERE
        self.streams[slot], self.stays[slot], self.decoding[slot], self.priority[slot] = None, NOWHERE, False, NO_PRIORITY
        self.shares.leave(int(self.share[slot]))
        self.free.append(slot)

    # ── each step ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def decodes(self, priority: int) -> Int64:
        """The slots of this priority that can decode."""
        return np.flatnonzero(self.decoding & (self.priority == priority))

    def launch(self, step: int, slots: Int32, counts: Int32) -> tuple[Int32, Bools]:
        """Slot `slots[i]` computes its next `counts[i]` tokens. Returns the position of the first, and whether the last one yields a
        new token, for each row."""
        self.ran[slots] = step
        starts = self.computed[slots]
        computed = self.computed[slots] = starts + counts
        samples = computed == self.length[slots]
        sampling = slots[samples]
        length = self.length[sampling] = computed[samples] + 1
        self.decoding[sampling] = length < self.total[sampling]  # at its full length a stream only waits for its results
        self.prefilling = [stream for stream in self.prefilling if self.computed[stream.slot] < self.known[stream.slot]]
        return starts, samples

    def take(self, slots: Int32, ids: Int32) -> tuple[Int32, Bools, Bools]:
        """Slot `slots[i]` has sampled `ids[i]`. Returns for each the tokens known before, whether it is a stop id, and whether it is the
        last one that may be."""
        known = self.known[slots]
        self.tokens[slots, known] = ids
        self.known[slots] = known + 1
        stopped = (ids[:, None] == self.stops[slots]).any(axis=1)
        return known, stopped, known + 1 >= self.total[slots]


def token_room(slots: int, max_model_len: int) -> Int32:
    """Zeros `[slots, max_model_len + 1]`, of which only pages that are used take memory. numpy asks for huge pages, of which a few short
    streams would take all."""
    room = mmap.mmap(-1, 4 * slots * (max_model_len + 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(room, np.int32).reshape(slots, -1)


class Shares:
    """Small numbers for the (priority, tenant) pairs that are running, so that what they are served is counted by column."""

    __slots__ = ("_members", "_number_of", "_pairs", "_unused")

    def __init__(self, most: int) -> None:
        self._number_of: dict[tuple[int, str], int] = {}
        self._pairs = [(0, "")] * most
        self._members = [0] * most
        self._unused = list(range(most - 1, -1, -1))

    def __getitem__(self, number: int) -> tuple[int, str]:
        return self._pairs[number]

    def __len__(self) -> int:
        return len(self._number_of)

    def priorities(self) -> set[int]:
        return {priority for priority, _ in self._number_of}

    def numbers(self, priority: int) -> dict[str, int]:
        """The number of each tenant that is running at this priority."""
        return {tenant: number for (level, tenant), number in self._number_of.items() if level == priority}

    def enter(self, priority: int, tenant: str) -> int:
        number = self._number_of.get((priority, tenant))
        if number is None:
            number = self._number_of[priority, tenant] = self._unused.pop()
            self._pairs[number] = (priority, tenant)
        self._members[number] += 1
        return number

    def leave(self, number: int) -> None:
        self._members[number] -= 1
        if not self._members[number]:
            del self._number_of[self._pairs[number]]
            self._unused.append(number)
