"""The scheduler: which tokens run in the next step. A pure state machine: same inputs, same plans.

    submit ──▶ queue ──admit──▶ slot: prefill chunks ──▶ decode ──▶ ended
                 ▲                        │ preempted           │
                 └──── settled ◀──────────┴─────────────────────┘

`plan` builds the next step and may be called again before the results of earlier steps are back (look-ahead); `commit` takes those
results in order. Everything that happens to every running row in every step is done on whole columns, indexed by slot.

For a slot, `known` tokens are on the host, `length` counts those in flight too, `computed` have their KV in a launched step:

    computed ≤ length,  known ≤ length,  pending = length - computed is what a step could compute: 1 for a decode
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt
from penstock.engine.blocks import BlockPool
from penstock.engine.plan import Fill, Int32, StepPlan, StepResult, TopLogprobs
from penstock.engine.queue import FairQueue
from penstock.engine.request import Request
from penstock.engine.stream import Stream, known_tokens

PromptLogprobs = tuple[int, int, TopLogprobs]  # handle, attempt, the prompt's tokens from the second on
NO_TOKENS: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes, in tokens where nothing else is said."""

    slots: int  # most streams in a step
    blocks: int
    block_size: int = 16
    token_budget: int = 2048  # most query tokens in a step
    max_model_len: int = 4096
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """The last word on a stream: why, and what it cost. `queue_s` to its first step, `prefill_s` to its first token."""

    handle: int
    attempt: int
    reason: str  # stop, length, cancelled, deadline, queue_timeout
    cached_tokens: int
    preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """What a step produced: row i is token `ids[i]`, at `offsets[i]` among the generated tokens of `handles[i]`."""

    handles: npt.NDArray[np.int64]
    attempts: Int32
    offsets: Int32
    ids: Int32
    ended: list[Ended]
    rows: Int32  # index of each row among the step's sampled ids, for `logprobs`
    logprobs: TopLogprobs | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()  # once a stream, with its first token


@dataclass(slots=True)
class Counters:
    """Sums since the start, for status reports."""

    steps: int = 0
    rows: int = 0
    query_tokens: int = 0
    sampled_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Launched:
    """A plan whose results are not back: its own row list, because slots may have new occupants by then."""

    step: int
    streams: list[Stream]  # [rows]
    slots: Int32  # [rows]
    epochs: npt.NDArray[np.int64]  # [rows] of the slot when the plan was made: another epoch is another stay, or another stream
    samples: npt.NDArray[np.bool_]  # [rows]


class Scheduler:
    """Give it requests, ask it for plans, tell it the results. Time enters as a value (`now`, seconds, monotonic)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.blocks)
        self.counters = Counters()
        self._queue: FairQueue[Stream] = FairQueue()
        self._streams: dict[int, Stream] = {}
        self._deadlines: list[tuple[float, int, int]] = []  # (when, handle, attempt)
        self._launched: deque[_Launched] = deque()
        self._ended: list[Ended] = []
        self._submitted = 0
        self._step = 0
        slots = config.slots
        self._occupants: list[Stream | None] = [None] * slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._prefilling: list[Stream] = []  # in slots, prompt not yet computed; in order of admission
        self._epoch = np.zeros(slots, np.int64)
        self._handles = np.zeros(slots, np.int64)
        self._attempts = np.zeros(slots, np.int32)
        self._prompts = np.zeros(slots, np.int32)
        self._known = np.zeros(slots, np.int32)
        self._length = np.zeros(slots, np.int32)
        self._computed = np.zeros(slots, np.int32)
        self._total = np.zeros(slots, np.int32)
        self._held = np.zeros(slots, np.int32)  # tokens that fit the slot's blocks
        self._published = np.zeros(slots, np.int32)  # blocks offered to the prefix index
        self._first = np.zeros(slots, np.int32)  # value of `known` at the first token of this stay
        self._decoding = np.zeros(slots, np.bool_)
        self._tenants = np.zeros(slots, np.int32)
        self._stops = np.full((slots, 4), -1, np.int32)
        self._tokens = np.zeros((slots, config.max_model_len + 1), np.int32)
        self._tenant_names: list[str] = []  # of the streams in slots, by the number in `_tenants`

    # ── what others may ask ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def in_flight(self) -> int:
        """Plans whose results are not back."""
        return len(self._launched)

    @property
    def running(self) -> int:
        return self.config.slots - len(self._free_slots)

    @property
    def waiting(self) -> int:
        return len(self._streams) - self.running

    def open_handles(self) -> list[int]:
        return list(self._streams)

    def fits(self, prompt_tokens: int) -> bool:
        """Whether a prompt of this length, and one token after it, can ever run."""
        return prompt_tokens < self.config.max_model_len and prompt_tokens <= self.config.blocks * self.config.block_size

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
        before = self._streams.get(request.handle)
        if before is not None:
            if before.request.attempt >= request.attempt:
                return
            self._remove(before)
        most = min(self.config.max_model_len, self.config.blocks * self.config.block_size + 1) - len(request.prompt)
        stream = Stream(replace(request, limit=min(request.limit, most)), self._submitted, now, known_tokens(request))
        self._submitted += 1
        self._streams[request.handle] = stream
        self._queue.push(stream)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.handle, request.attempt))
        if request.queue_timeout is not None:
            heappush(self._deadlines, (request.queue_timeout, request.handle, request.attempt))

    def abort(self, handle: int, now: float, reason: str = "cancelled") -> None:
        """End a stream. Unknown handles are ignored: it may have ended by itself."""
        stream = self._streams.get(handle)
        if stream is not None:
            self._end(stream, reason, now)

    # ── the next step ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can run before another result or request arrives."""
        self._expire(now)
        writes = _TableWrites()
        chunks: list[tuple[Stream, int]] = []
        fills: list[Fill] = []
        decodes = self._plan_decodes(writes)
        budget = self.config.token_budget - len(decodes)
        for stream in self._prefilling:
            budget -= self._chunk(stream, budget, chunks)
        self._admit(budget, chunks, fills, writes, now)
        decodes = decodes[self._decoding[decodes]]  # a stream of higher priority may have taken a slot
        if not len(decodes) and not chunks:
            return None
        return self._finish(decodes, chunks, fills, writes)

    def _plan_decodes(self, writes: _TableWrites) -> Int32:
        """Every stream that can decode, with a block for its next token: the oldest first, at the cost of the newest if need be."""
        decodes = np.flatnonzero(self._decoding).astype(np.int32)
        if len(decodes) > self.config.token_budget:  # only with a budget smaller than the slots: take turns
            decodes = np.sort(np.roll(decodes, -self._step)[: self.config.token_budget])
        full = decodes[self._computed[decodes] >= self._held[decodes]]
        if len(full):
            for stream in sorted((self._occupant(slot) for slot in full), key=lambda stream: stream.rank, reverse=True):
                if stream.slot >= 0:  # else it has yielded to one before it
                    self._grow(stream, writes)
            decodes = decodes[self._decoding[decodes]]
        return decodes

    def _chunk(self, stream: Stream, budget: int, chunks: list[tuple[Stream, int]]) -> int:
        """Plan the next tokens of a prompt, as far as the budget goes. Returns their number."""
        computed = int(self._computed[stream.slot])
        count = min(int(self._known[stream.slot]) - computed, budget)
        if count > 0:
            chunks.append((stream, count))
            # From here on others may share what this step computes: in each layer all keys are written before any is read.
            self._publish(stream, computed + count)
        return count

    def _admit(self, budget: int, chunks: list[tuple[Stream, int]], fills: list[Fill], writes: _TableWrites, now: float) -> None:
        """Fill slots from the queue, in its order, while tokens, slots and blocks last."""
        while budget > 0 and (stream := self._queue.head()) is not None:
            hits = self._match(stream)
            while not self._free_slots or self._lacks_blocks(stream, hits):
                if not self._yield_to(stream, chunks):
                    return
            self._queue.pop()
            self._fill(stream, hits, fills, writes, now)
            budget -= self._chunk(stream, budget, chunks)

    def _lacks_blocks(self, stream: Stream, hits: list[int]) -> bool:
        need = -(-len(stream.tokens) // self.config.block_size) - len(hits) + sum(self.pool.is_cached(block) for block in hits)
        # Leave the running streams some blocks to grow into: admitting up to the last block would preempt at once.
        return self.pool.available < need + min(self.running, self.config.blocks // 16)

    def _match(self, stream: Stream) -> list[int]:
        """Blocks that hold the longest cached prefix. The last known token is always computed: its logits are wanted."""
        hits: list[int] = []
        if not self.config.prefix_cache or stream.request.sampler.prompt_logprobs >= 0:
            return hits
        for index in range((len(stream.tokens) - 1) // self.config.block_size):
            block = self.pool.lookup(stream.digest(index, stream.tokens, self.config.block_size))
            if block is None:
                break
            hits.append(block)
        return hits

    def _fill(self, stream: Stream, hits: list[int], fills: list[Fill], writes: _TableWrites, now: float) -> None:
        """Give a stream a slot, and blocks for all its known tokens, beginning with those of its cached prefix."""
        slot = stream.slot = self._free_slots.pop()
        request, known, size = stream.request, len(stream.tokens), self.config.block_size
        for block in hits:
            self.pool.hold(block)
        stream.blocks = [*hits, *(self._block() for _ in range(-(-known // size) - len(hits)))]
        for column, block in enumerate(stream.blocks):
            writes.add(slot, column, block)
        hit_tokens = len(hits) * size
        self._prefilling.append(stream)
        self.counters.prefix_hit_tokens += hit_tokens
        self.counters.prefix_query_tokens += known
        if stream.started is None:
            stream.started, stream.cached_tokens = now, hit_tokens
        self._occupants[slot] = stream
        self._epoch[slot] += 1
        self._handles[slot], self._attempts[slot] = request.handle, request.attempt
        self._prompts[slot], self._total[slot] = len(request.prompt), stream.total
        self._known[slot] = self._length[slot] = self._first[slot] = known
        self._computed[slot], self._held[slot] = hit_tokens, len(stream.blocks) * size
        self._published[slot] = len(hits)
        self._decoding[slot] = False
        self._tenants[slot] = self._tenant_number(request.tenant)
        stops = request.sampler.stop_ids
        if len(stops) > self._stops.shape[1]:
            wider = np.full((self.config.slots, len(stops)), -1, np.int32)
            wider[:, : self._stops.shape[1]] = self._stops
            self._stops = wider
        self._stops[slot] = -1
        self._stops[slot, : len(stops)] = stops
        self._tokens[slot, :known] = stream.tokens
        sampler = request.sampler
        if known > len(request.prompt):
            sampler = replace(sampler, prompt_logprobs=-1)  # they were told with its first token
        needs_history = sampler.counts_tokens or sampler.bad_words or sampler.prompt_logprobs >= 0
        fills.append(Fill(slot, len(request.prompt), sampler, stream.tokens if needs_history else NO_TOKENS))

    def _finish(self, decodes: Int32, chunks: list[tuple[Stream, int]], fills: list[Fill], writes: _TableWrites) -> StepPlan:
        chunk_slots = np.array([stream.slot for stream, _ in chunks], np.int32)
        counts = np.ones(len(decodes) + len(chunks), np.int32)
        counts[len(decodes) :] = [count for _, count in chunks]
        slots = np.concatenate([decodes, chunk_slots])
        starts = self._computed[slots]
        tokens = [self._tokens[s.slot, start : start + n] for (s, n), start in zip(chunks, starts[len(decodes) :], strict=True)]
        self._computed[slots] += counts
        samples = self._computed[slots] == self._length[slots]
        sampling = slots[samples]
        self._length[sampling] += 1
        # At its full length a stream is only waiting for its results.
        self._decoding[sampling] = self._length[sampling] < self._total[sampling]
        for stream, count in chunks:
            self._queue.charge(stream.tenant, count)
        self._prefilling = [stream for stream in self._prefilling if self._computed[stream.slot] < self._known[stream.slot]]
        rows = [self._occupant(slot) for slot in slots]
        self._launched.append(_Launched(self._step, rows, slots, self._epoch[slots], samples))
        plan = StepPlan(
            self._step, tuple(fills), *writes.columns(), slots, starts, counts, len(decodes), samples,
            np.concatenate(tokens) if tokens else NO_TOKENS,
        )  # fmt: skip
        self._step += 1
        self.counters.steps += 1
        self.counters.rows += len(slots)
        self.counters.query_tokens += plan.query_tokens
        return plan

    # ── results ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, result: StepResult, now: float) -> Commit:
        """Take the results of the oldest launched plan. Raises `ValueError` if they are of another step."""
        launched = self._launched.popleft()
        if launched.step != result.step or len(result.ids) != np.count_nonzero(launched.samples):
            raise ValueError(f"results of step {result.step} with {len(result.ids)} ids: expected step {launched.step}")
        self._collect_prompts(launched, result)
        ids, sampled = result.ids, np.flatnonzero(launched.samples)
        slots = launched.slots[sampled]
        rows = np.arange(len(slots), dtype=np.int32)
        fresh = self._epoch[slots] == launched.epochs[sampled]
        told: list[PromptLogprobs] = []
        late: list[tuple[Stream, int, int]] = []
        if not fresh.all():
            late = self._settle([(launched.streams[sampled[row]], int(row)) for row in rows[~fresh]], ids, told, now)
            slots, rows = slots[fresh], rows[fresh]
            ids = ids[fresh]
        known = self._known[slots]
        self._tokens[slots, known] = ids
        self._known[slots] = known + 1
        handles, attempts, offsets = self._handles[slots], self._attempts[slots], known - self._prompts[slots]
        self._publish_generated(slots)
        for slot in slots[known == self._first[slots]]:
            self._begin(self._occupant(slot), told, now)
        for number, tokens in enumerate(np.bincount(self._tenants[slots])):
            if tokens:
                self._queue.charge(self._tenant_names[number], int(tokens))
        stopped = (ids[:, None] == self._stops[slots]).any(axis=1)
        for i in np.flatnonzero(stopped | (known + 1 >= self._total[slots])):
            self._end(self._occupant(slots[i]), "stop" if stopped[i] else "length", now)
        if late:
            handles = np.concatenate([handles, np.array([stream.handle for stream, _, _ in late], np.int64)])
            attempts = np.concatenate([attempts, np.array([stream.request.attempt for stream, _, _ in late], np.int32)])
            rows = np.concatenate([rows, np.array([row for _, row, _ in late], np.int32)])
            offsets = np.concatenate([offsets, np.array([offset for _, _, offset in late], np.int32)])
        self.counters.sampled_tokens += len(rows)
        return Commit(handles, attempts, offsets, result.ids[rows], self.take_ended(), rows, result.logprobs, tuple(told))

    def _settle(
        self, rows: list[tuple[Stream, int]], ids: Int32, told: list[PromptLogprobs], now: float
    ) -> list[tuple[Stream, int, int]]:
        """Results for streams that left their slot since: one that was preempted takes them (else it would make no progress), one
        that ended does not. Returns (stream, row, offset)."""
        taken = []
        for stream, row in rows:
            if stream.gone:
                continue
            token = int(ids[row])
            stream.in_flight -= 1
            self._begin(stream, told, now)
            taken.append((stream, row, len(stream.tokens) - len(stream.request.prompt)))
            stream.tokens = np.append(stream.tokens, np.int32(token))
            if token in stream.request.sampler.stop_ids or len(stream.tokens) >= stream.total:
                self._end(stream, "stop" if token in stream.request.sampler.stop_ids else "length", now)
            elif stream.in_flight == 0:
                self._queue.push(stream, front=True)
        return taken

    def _begin(self, stream: Stream, told: list[PromptLogprobs], now: float) -> None:
        """The first token of this stay, perhaps of the stream."""
        stream.first_token = now if stream.first_token is None else stream.first_token
        if stream.prompt_parts:
            columns = (np.concatenate([getattr(part, name) for part in stream.prompt_parts]) for name in ("rows", "ids", "values", "ranks"))
            told.append((stream.handle, stream.request.attempt, TopLogprobs(*columns)))
            stream.prompt_parts = []

    def _publish_generated(self, slots: Int32) -> None:
        """Offer blocks that became full to the prefix index: every token known, every key computed."""
        full = np.minimum(self._known[slots], self._computed[slots]) // self.config.block_size
        for slot in slots[full > self._published[slots]]:
            self._publish(self._occupant(slot), int(min(self._known[slot], self._computed[slot])))

    def _collect_prompts(self, launched: _Launched, result: StepResult) -> None:
        """Keep the log-probabilities of prompt chunks until the first token. Those of a prefill that was cut short by preemption are
        dropped: it will be computed again from its start."""
        part = result.prompt_logprobs
        if part is None:
            return
        for row in np.unique(part.rows):
            stream = launched.streams[row]
            if not stream.gone and (stream.in_flight or self._epoch[launched.slots[row]] == launched.epochs[row]):
                of_row = part.rows == row
                stream.prompt_parts.append(TopLogprobs(part.rows[of_row], part.ids[of_row], part.values[of_row], part.ranks[of_row]))

    # ── blocks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self) -> int:
        block = self.pool.allocate()
        if block is None:
            raise RuntimeError("no block is left after they were counted")
        return block

    def _grow(self, stream: Stream, writes: _TableWrites) -> None:
        """One more block for a decode, preempting whoever yields to this stream; if nobody does, the stream itself."""
        while (block := self.pool.allocate()) is None:
            victim = min((other for other in self._occupants if other is not None), key=lambda other: other.rank)
            self._preempt(victim)
            if victim is stream:
                return
        writes.add(stream.slot, len(stream.blocks), block)
        stream.blocks.append(block)
        self._held[stream.slot] += self.config.block_size

    def _yield_to(self, waiting: Stream, chunks: list[tuple[Stream, int]]) -> bool:
        """Preempt a running stream of lower priority than a waiting one, but none with a chunk in this plan. False if there is none."""
        planned = {id(other) for other, _ in chunks}
        others = [o for o in self._occupants if o is not None and id(o) not in planned and o.priority < waiting.priority]
        if not others:
            return False
        self._preempt(min(others, key=lambda other: other.rank))
        return True

    def _publish(self, stream: Stream, tokens: int) -> None:
        """Offer the full blocks among the first `tokens` tokens to the prefix index."""
        slot, size = stream.slot, self.config.block_size
        if self.config.prefix_cache:
            for index in range(int(self._published[slot]), tokens // size):
                digest = stream.digest(index, self._tokens[slot, : self._known[slot]], size)
                self.pool.publish(stream.blocks[index], digest)
        self._published[slot] = max(self._published[slot], tokens // size)

    # ── leaving ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _preempt(self, stream: Stream) -> None:
        """Take slot and blocks away; what was generated stays, and is prefilled again later."""
        slot = stream.slot
        stream.tokens = self._tokens[slot, : self._known[slot]].copy()
        stream.in_flight = int(self._length[slot] - self._known[slot])
        stream.preemptions += 1
        self.counters.preemptions += 1
        if stream in self._prefilling:
            stream.prompt_parts = []
        self._leave(stream)
        if not stream.in_flight:  # else it becomes eligible again once they are committed
            self._queue.push(stream, front=True)

    def _leave(self, stream: Stream) -> None:
        slot = stream.slot
        self.pool.release(stream.blocks)
        stream.blocks = []
        stream.slot = -1
        self._occupants[slot] = None
        self._epoch[slot] += 1
        self._decoding[slot] = False
        self._free_slots.append(slot)
        if stream in self._prefilling:
            self._prefilling.remove(stream)

    def _remove(self, stream: Stream) -> None:
        stream.gone = True
        if stream.slot >= 0:
            self._leave(stream)
        del self._streams[stream.handle]

    def _end(self, stream: Stream, reason: str, now: float) -> None:
        self._remove(stream)
        started = now if stream.started is None else stream.started
        first = now if stream.first_token is None else stream.first_token
        self._ended.append(
            Ended(
                stream.handle, stream.request.attempt, reason, stream.cached_tokens, stream.preemptions,
                started - stream.arrived, first - started, now - first,
            )  # fmt: skip
        )

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            when, handle, attempt = heappop(self._deadlines)
            stream = self._streams.get(handle)
            if stream is None or stream.request.attempt != attempt:
                continue
            if stream.request.deadline == when:
                self._end(stream, "deadline", now)
            elif stream.started is None:
                self._end(stream, "queue_timeout", now)

    def _occupant(self, slot: int | np.integer) -> Stream:
        stream = self._occupants[slot]
        if stream is None:
            raise RuntimeError(f"slot {slot} is empty")
        return stream

    def _tenant_number(self, tenant: str) -> int:
        if tenant not in self._tenant_names:
            if len(self._tenant_names) >= 2 * self.config.slots:  # forget who is not running, or the list would grow for ever
                self._tenant_names = sorted({other.tenant for other in self._occupants if other is not None} | {tenant})
                for slot, other in enumerate(self._occupants):
                    self._tenants[slot] = self._tenant_names.index(other.tenant) if other is not None else 0
                self._queue.forget_idle(set(self._tenant_names))
            else:
                self._tenant_names.append(tenant)
        return self._tenant_names.index(tenant)


class _TableWrites:
    """Block table entries written by one plan, in order: a later write to the same entry wins."""

    __slots__ = ("_blocks", "_columns", "_slots")

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._columns: list[int] = []
        self._blocks: list[int] = []

    def add(self, slot: int, column: int, block: int) -> None:
        self._slots.append(slot)
        self._columns.append(column)
        self._blocks.append(block)

    def columns(self) -> tuple[Int32, Int32, Int32]:
        return np.array(self._slots, np.int32), np.array(self._columns, np.int32), np.array(self._blocks, np.int32)
