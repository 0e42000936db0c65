"""The scheduler: which tokens run in the next step. A pure state machine: same inputs, same plans.

    submit ──▶ queue ──admit──▶ slot: prefill chunks ──▶ decode ──▶ ended
                 ▲                        │ preempted           │
                 └──── settled ◀──────────┴─────────────────────┘

`plan` builds the next step and may be called again before the results of earlier steps are back (look-ahead); `commit` takes those
results in order. The token budget of a step goes by priority; within one, decodes come first, then the prompts that have begun, in
order of admission, then the queue. So nobody waits for a lower priority longer than the steps that are launched already.

Tenants of one priority share what is scarce. Tokens: the queue goes by what each was served, and in a step nobody gets much more than
the others (`engine.turns`). Slots and blocks: whoever holds less than the one that holds the most may take from it (`Room.level`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from penstock.engine.commit import Commit, Counters, Ended, PromptLogprobs
from penstock.engine.deadlines import Deadlines
from penstock.engine.draft import Draft, Launched
from penstock.engine.lora.residency import Load
from penstock.engine.plan import Int32, StepPlan, StepResult
from penstock.engine.request import Adapter, Request
from penstock.engine.room import Room, SchedulerConfig
from penstock.engine.slots import Int64
from penstock.engine.stream import NO_TOKENS, NOWHERE, Stream, known_tokens
from penstock.engine.turns import Allowance, Turns

ADAPTERS = 2**20  # more than can run at once

__all__ = ["NO_TOKENS", "Commit", "Counters", "Ended", "PromptLogprobs", "Scheduler", "SchedulerConfig"]


class Scheduler:
    """Give it requests, ask it for plans, tell it the results. Time enters as a value (`now`, seconds, monotonic)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._room = room = Room(config)
        self.pool, self.counters = room.pool, room.counters
        self._slots, self._prefixes, self._queue, self._residency = room.slots, room.prefixes, room.queue, room.residency
        self._turns = Turns(config.quantum, config.token_budget)
        self._streams: dict[int, Stream] = {}
        self._deadlines = Deadlines()
        self._launched: deque[Launched] = deque()
        self._ended: list[Ended] = []
        self._told: list[PromptLogprobs] = []
        self._submitted = self._step = 0

    # ── what others may ask ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def in_flight(self) -> int:
        """Plans whose results are not back."""
        return len(self._launched)

    @property
    def running(self) -> int:
        return self._slots.running

    @property
    def waiting(self) -> int:
        return len(self._streams) - self.running

    def open_handles(self) -> list[int]:
        return list(self._streams)

    def flying_handles(self) -> list[int]:
        """Streams with a row in a plan whose results are not back."""
        return list({stream.handle: None for launched in self._launched for stream in launched.streams if not stream.gone})

    def fits(self, prompt_tokens: int) -> bool:
        """Whether a prompt of this length, and one token after it, can ever run."""
        return prompt_tokens < self.config.max_model_len and prompt_tokens <= self.config.blocks * self.config.block_size

    def fits_adapter(self, adapter: Adapter | None) -> bool:
        """Whether there is room for an adapter, beside those that are pinned."""
        return self._residency.fits(adapter)

    def adapters(self) -> list[tuple[str, str, int, int, int]]:
        """Of those that are wanted or here: digest, state, streams that run and that wait, tokens served."""
        return self._residency.report()

    def take_loads(self) -> list[Load]:
        """Adapters that must be put into their pages; `loaded` or `lost` answers each. The plans launched before may still read what was
        there."""
        return self._residency.take_loads()

    def take_ended(self) -> list[Ended]:
        """Streams that ended since the last `commit` or call of this."""
        ended, self._ended = self._ended, []
        return ended

    # ── inputs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. A newer attempt replaces an older one of the same handle; an older one is ignored. Raises `ValueError`
        if it could never run: the caller judges requests before this."""
        known = len(request.prompt) + len(request.generated)
        if not len(request.prompt) or not self.fits(known) or len(request.generated) >= request.limit:
            raise ValueError(f"a request of {known} known tokens with limit {request.limit} cannot run here")
        if not self.fits_adapter(request.adapter):
            pages = 0 if request.adapter is None else request.adapter.pages
            raise ValueError(f"an adapter of {pages} pages does not fit beside those that are pinned, in {self.config.adapter_pages} pages")
        before = self._streams.get(request.handle)
        if before is not None:
            if before.attempt >= request.attempt:
                return
            self._remove(before)
        most = min(self.config.max_model_len, self.config.blocks * self.config.block_size + 1) - len(request.prompt)
        stream = Stream(replace(request, limit=min(request.limit, most)), self._submitted, now, known_tokens(request))
        self._submitted += 1
        self._streams[request.handle] = stream
        self._residency.open(request.adapter, request.priority, now)
        self._queue.push(stream, floor=self._least_served(stream.priority))
        self._deadlines.watch(stream)

    def _least_served(self, priority: int) -> int:
        """The smallest counter of the tenants that are running."""
        running = self._slots.shares.numbers(priority)
        return min((self._queue.served(priority, tenant) for tenant in running), default=0)

    def abort(self, handle: int, now: float, reason: str = "cancelled") -> None:
        """End a stream. Unknown handles are ignored: it may have ended by itself."""
        stream = self._streams.get(handle)
        if stream is not None:
            self._end(stream, reason, now)

    def loaded(self, number: int, now: float) -> None:
        """A load is done."""
        self._residency.loaded(number, now)

    def lost(self, number: int, now: float) -> None:
        """A load has failed: the streams that waited for it end."""
        digest = self._residency.lost(number, now)
        for stream in [stream for stream in self._streams.values() if digest is not None and stream.adapter == digest]:
            self._end(stream, "adapter_lost", now)

    def pin(self, adapter: Adapter, now: float) -> bool:
        """Keep an adapter here, wanted or not. False if there is no room for it beside what is wanted and pinned."""
        return self._residency.pin(adapter, now)

    def unpin(self, digest: bytes) -> None:
        self._residency.unpin(digest)

    def attempt(self, handle: int) -> int | None:
        """Of an open stream: which of its hand-overs it is from."""
        stream = self._streams.get(handle)
        return None if stream is None else stream.attempt

    def expire(self, now: float) -> None:
        """End the streams whose time is over."""
        self._expire(now)

    def _expire(self, now: float) -> None:
        for stream, reason in self._deadlines.due(now):
            self._end(stream, reason, now)

    # ── the next step ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can run before another result or request arrives."""
        self._expire(now)
        self._room.turn_adapters(now)
        draft = Draft(self.config.token_budget)
        for priority in sorted(self._slots.shares.priorities() | self._queue.priorities(), reverse=True):
            running = self._slots.shares.numbers(priority)
            contested = self._turns.quantum and len({*running, *self._queue.tenants(priority)}) > 1
            first = self._room.level(priority) if contested else None
            allowance = self._turns.begin(priority, running, self._room.comer(priority, first, running) if contested else None, now)
            self._decode(priority, draft, allowance)
            for stream in self._slots.prefilling:
                if stream.priority == priority:
                    self._chunk(stream, draft, allowance)
            self._admit(priority, draft, allowance, first, now)
            if allowance is not None:
                self._turns.end(priority, allowance)
        if (step := draft.launch(self._step, self._slots)) is None:
            return None
        plan, launched = step
        self._launched.append(launched)
        self._step += 1
        self.counters.count(plan)
        return plan

    def _decode(self, priority: int, draft: Draft, allowance: Allowance | None) -> None:
        """Every stream that can decode, with a block for its next token; of a tenant that has had more than others, those whose turn
        it is."""
        slots = self._slots
        rows = slots.decodes(priority)
        if allowance is not None:
            rows = self._in_turn(rows, priority, allowance)
        if len(rows) > draft.budget:  # a higher priority left them too little: take turns
            rows = np.sort(np.roll(rows, -self._step)[: draft.budget])
        full = rows[slots.computed[rows] >= slots.held[rows]]
        if len(full):
            self._room.grow(full, draft)
            rows = rows[slots.decoding[rows]]  # some may have yielded
        draft.decode(rows)

    def _in_turn(self, rows: Int64, priority: int, allowance: Allowance) -> Int64:
        shares = self._slots.share[rows]
        for tenant, number in self._slots.shares.numbers(priority).items():
            mine = shares == number
            wanted = int(np.count_nonzero(mine))
            granted = allowance.grant(tenant, wanted, wanted)
            if granted < wanted:
                rows = np.sort(np.concatenate([rows[~mine], self._slots.in_turn(rows[mine], granted)]))
                shares = self._slots.share[rows]
        return rows

    def _chunk(self, stream: Stream, draft: Draft, allowance: Allowance | None) -> None:
        """The next tokens of a prompt, as far as the budget goes, and what its tenant may have of it."""
        start = int(self._slots.computed[stream.slot])
        tokens = self._slots.known_tokens(stream)[start : start + draft.budget]
        if allowance is not None:
            tokens = tokens[: allowance.grant(stream.tenant, int(self._slots.known[stream.slot]) - start, draft.budget)]
        if len(tokens):
            draft.chunk(stream.slot, tokens)
            self._queue.charge(stream.priority, stream.tenant, len(tokens))
            self._charge_adapter(stream.priority, stream.tenant, int(self._slots.adapter[stream.slot]), len(tokens))
            # From here on others may share what this step computes: in each layer all keys are written before any is read.
            self._prefixes.offer(stream, start + len(tokens))

    def _admit(self, priority: int, draft: Draft, allowance: Allowance | None, first: Stream | None, now: float) -> None:
        """Fill slots from the queue, `first` and then in its order, while tokens, slots and blocks last."""
        while draft.budget > 0:
            stream, first = first or self._room.next(priority, allowance.spent() if allowance is not None else ()), None
            hits = None if stream is None else self._room.make_room(stream)
            if stream is None or hits is None:
                return
            self._queue.pop(stream)
            self._room.fill(stream, hits, draft, now)
            self._chunk(stream, draft, allowance)

    # ── results ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, result: StepResult, now: float) -> Commit:
        """Take the results of the oldest launched plan. Raises `ValueError` if they are not its; then nothing has changed."""
        launched = self._launched[0] if self._launched else None
        if launched is None or launched.step != result.step or len(launched.sampled) != len(result.ids):
            raise ValueError(f"step {result.step} with {len(result.ids)} ids ({result.error or 'no error'}): expected {launched}")
        self._launched.popleft()
        launched.keep_prompts(result.prompt_logprobs)
        late: list[tuple[int, int, int, int]] = []
        running, queue = self._slots, self._queue
        slots, ids, rows = launched.slots[launched.sampled], result.ids, np.arange(len(result.ids), dtype=np.int32)
        fresh = running.stays[slots] == launched.stays[launched.sampled]
        if not fresh.all():
            late = self._settle(launched, np.flatnonzero(~fresh).tolist(), ids, now)
            slots, ids, rows = slots[fresh], ids[fresh], rows[fresh]
        handles, attempts = running.handles[slots], running.attempts[slots]
        known, stopped, full = running.take(slots, ids)
        offsets = known - running.prompts[slots]
        for share, tokens in enumerate(np.bincount(running.share[slots]).tolist()):
            if tokens:
                queue.charge(*running.shares[share], tokens)
        if running.adapter[slots].any():
            pairs, counts = np.unique(running.share[slots] * ADAPTERS + running.adapter[slots], return_counts=True)
            for pair, tokens in zip(pairs.tolist(), counts.tolist(), strict=True):
                self._charge_adapter(*running.shares[pair // ADAPTERS], pair % ADAPTERS, tokens)
        for stream in running.at(slots[known == running.first[slots]]):
            self._begin(stream, now)
        self._prefixes.offer_generated(slots)
        ending = np.flatnonzero(stopped | full)
        for stream, stop in zip(running.at(slots[ending]), stopped[ending].tolist(), strict=True):
            self._end(stream, "stop" if stop else "length", now)
        if late:
            more = np.array(late, np.int64)
            handles, attempts = np.append(handles, more[:, 0]), np.append(attempts, more[:, 1].astype(np.int32))
            offsets, rows = np.append(offsets, more[:, 2].astype(np.int32)), np.append(rows, more[:, 3].astype(np.int32))
        self.counters.sampled_tokens += len(rows)
        told, self._told = tuple(self._told), []
        return Commit(handles, attempts, offsets, result.ids[rows], self.take_ended(), rows, result.logprobs, told)

    def _charge_adapter(self, priority: int, tenant: str, adapter: int, tokens: int) -> None:
        """`adapter` is its number among those that run."""
        self._queue.charge_adapter(priority, tenant, self._residency.charge(adapter, tokens), tokens)

    def _settle(self, launched: Launched, rows: list[int], ids: Int32, now: float) -> list[tuple[int, int, int, int]]:
        """Results for streams that left their slot since: one that was preempted takes them (else it would make no progress), one
        that ended does not. Returns (handle, attempt, offset, row) for each that was taken."""
        taken = []
        for row in rows:
            stream, token = launched.streams[launched.sampled[row]], int(ids[row])
            if stream.gone:
                continue
            taken.append((stream.handle, stream.attempt, len(stream.tokens) - len(stream.request.prompt), row))
            self._begin(stream, now)
            self._queue.charge(stream.priority, stream.tenant, 1)
            reason = stream.take(token)
            if reason is not None:
                self._end(stream, reason, now)
            elif not stream.in_flight:
                self._queue.push(stream, front=True)
        return taken

    def _begin(self, stream: Stream, now: float) -> None:
        """The first token of this stay, perhaps of the stream."""
        stream.first_token = now if stream.first_token is None else stream.first_token
        if stream.prompt_parts:
            self._told.append((stream.handle, stream.attempt, stream.take_prompt_parts()))

    # ── leaving ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _remove(self, stream: Stream) -> None:
        stream.gone, stream.prompt_parts = True, []  # a recorder remembers the stream, and need not what nobody gets
        if stream.slot != NOWHERE:
            self._room.leave(stream)
        self._residency.close(stream.request.adapter, stream.priority)
        del self._streams[stream.handle]

    def _end(self, stream: Stream, reason: str, now: float) -> None:
        self._remove(stream)
        self._ended.append(stream.account(reason, now))
