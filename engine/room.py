"""Room: who has slots, KV blocks and pages of adapters, who is given some, and who yields for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from penstock.engine.blocks import BlockPool
from penstock.engine.commit import Counters
from penstock.engine.draft import Draft
from penstock.engine.lora.residency import Residency
from penstock.engine.prefix import Prefixes
from penstock.engine.queue import FairQueue
from penstock.engine.slots import Int64, Slots
from penstock.engine.stream import NOWHERE, Stream
from penstock.engine.turns import who_yields


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes, in tokens where nothing else is said."""

    slots: int  # most streams in a step
    blocks: int
    block_size: int = 16
    token_budget: int = 2048  # most query tokens in a step
    max_model_len: int = 4096
    prefix_cache: bool = True
    quantum: int = 16  # tokens of a step that a tenant gets at least, however little others ask for; 0: it holds nobody back
    adapter_pages: int = 0


class Room:
    """A stream waits in `queue`, or has one of `slots` with blocks of `pool`, and its adapter is resident; or it was preempted, and waits
    for the results of launched steps before it is queued again."""

    __slots__ = ("_config", "counters", "pool", "prefixes", "queue", "residency", "slots")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.counters = Counters()
        self.pool = BlockPool(config.blocks)
        self.slots = Slots(config.slots, config.block_size, config.max_model_len)
        self.prefixes = Prefixes(self.pool, self.slots, enabled=config.prefix_cache)
        self.queue: FairQueue[Stream] = FairQueue()
        self.residency = Residency(config.adapter_pages, config.slots)

    def turn_adapters(self, now: float) -> None:
        """Streams yield whose adapter has to make room for another one; but not before the first token of their stay, or a prompt that
        takes longer than a turn would be begun again and again."""
        yielding = self.residency.yielding(now)
        if yielding:
            slots = self.slots
            for stream in [stream for stream in slots.occupants() if stream.adapter in yielding]:
                if slots.known[stream.slot] > slots.first[stream.slot]:
                    self.preempt(stream)
        self.residency.plan(now)

    def next(self, priority: int, without: Collection[str] = ()) -> Stream | None:
        """Who is next in the queue, of those whose adapter is here."""
        return self.queue.head_at(priority, without, self.residency.can_run)

    def comer(self, priority: int, first: Stream | None, running: Collection[str]) -> str | None:
        """The tenant of the next stream that can be let in, if it has none running."""
        stream = first or self.next(priority, running)
        if stream is None or not self.slots.free or self._blocks_for(stream) > self.pool.available:
            return None
        return stream.tenant

    def level(self, priority: int) -> Stream | None:
        """Make room for a stream whose tenant holds less than the one that holds the most: of slots, if they are short, or else of blocks.
        Returns the stream: it must be admitted next, or whoever yielded for it would take its place again."""
        slots, pool = self.slots, self.pool
        holdings = slots.holdings(priority) if self.queue.tenants(priority) else {}
        if not holdings or slots.below(priority):
            return None  # lower priorities yield first: see `make_room`
        held = {tenant: sum(len(stream.blocks) for stream in streams) for tenant, streams in holdings.items()}
        richest = max(holdings, key=lambda tenant: (held[tenant] if slots.free else len(holdings[tenant]), tenant))
        busy = {stream.tenant for stream in slots.prefilling if stream.priority == priority}  # these have no use for another slot yet
        stream = self.next(priority, {*busy, richest})
        if stream is None:
            return None
        served = self.queue.served(priority, stream.tenant) - self.queue.served(priority, richest)
        if not slots.free and served > self._config.token_budget:
            return None  # it has less because its streams cost more
        need = self._blocks_for(stream)
        if slots.free and need <= pool.available:
            head = self.next(priority)
            return stream if head is not None and self._blocks_for(head) > pool.available else None
        need -= sum(not pool.is_cached(block) for block in self.prefixes.match(stream))
        yielding = who_yields(holdings.get(stream.tenant, []), holdings[richest], not slots.free, need, pool.available)
        for victim in yielding:
            self.preempt(victim)
        return stream if yielding else None

    def _blocks_for(self, stream: Stream) -> int:
        """Blocks that must be there for a stream to be admitted, if none of its prefix is cached."""
        return -(-len(stream.tokens) // self._config.block_size) + self._spare()

    def _spare(self) -> int:
        """Blocks that are left to the running streams to grow into: admitting up to the last block would preempt at once."""
        return min(self.slots.running, self._config.blocks // 16)

    def make_room(self, stream: Stream) -> list[int] | None:
        """Preempt streams of lower priority until there is a slot for this one, and blocks for all its known tokens. Returns the
        blocks of its cached prefix, or None if it has to wait. The streams that yield have no row in this step yet."""
        slots, pool, size = self.slots, self.pool, self._config.block_size
        lower = slots.below(stream.priority)
        if not lower and (not slots.free or not pool.available):
            return None
        hits = self.prefixes.match(stream)
        blocks = -(-len(stream.tokens) // size) - len(hits)
        if blocks > pool.available + sum(len(other.blocks) for other in lower):
            return None  # even if all of them yielded
        while True:
            need = blocks + sum(pool.is_cached(block) for block in hits)
            if slots.free and pool.available >= need + self._spare():
                return hits
            if slots.running == 0 or slots.lowest().priority >= stream.priority:
                return None
            self.preempt(slots.lowest())

    def fill(self, stream: Stream, hits: list[int], draft: Draft, now: float) -> None:
        """Give a stream a slot, and blocks for all its known tokens, beginning with those of its cached prefix."""
        known, size = len(stream.tokens), self._config.block_size
        for block in hits:
            self.pool.hold(block)
        stream.blocks = hits + self.pool.allocate(-(-known // size) - len(hits))
        adapter, pages = self.residency.enter(stream.request.adapter)
        self.slots.fill(stream, len(hits), adapter)
        self.counters.prefix_hit_tokens += len(hits) * size
        self.counters.prefix_query_tokens += known
        if stream.started is None:
            stream.started, stream.cached_tokens = now, len(hits) * size
        draft.fill(stream.filling(pages), stream.blocks)

    def grow(self, full: Int64, draft: Draft) -> None:
        """One more block for each of these slots, at the cost of whoever is lowest, themselves included. That is never a stream with
        a row in this step already: those have a higher priority than these."""
        growing = self.slots.at(full)
        while len(growing) > self.pool.available:
            self.preempt(self.slots.lowest())
            growing = [stream for stream in growing if stream.slot != NOWHERE]
        blocks, slots = self.pool.allocate(len(growing)), [stream.slot for stream in growing]
        draft.grow(slots, [len(stream.blocks) for stream in growing], blocks)
        for stream, block in zip(growing, blocks, strict=True):
            stream.blocks.append(block)
        self.slots.held[slots] += self._config.block_size

    def preempt(self, stream: Stream) -> None:
        """Take slot and blocks away; what was generated stays, and is prefilled again later."""
        stream.preemptions += 1
        self.counters.preemptions += 1
        if stream in self.slots.prefilling:
            stream.stay, stream.prompt_parts = NOWHERE, []
        self.leave(stream)
        if not stream.in_flight:  # else it becomes eligible again once they are committed
            self.queue.push(stream, front=True)

    def leave(self, stream: Stream) -> None:
        self.prefixes.offer_known(stream)
        self.slots.leave(stream)
        self.residency.leave(stream.request.adapter)
        self.pool.release(stream.blocks)
        stream.blocks = []
