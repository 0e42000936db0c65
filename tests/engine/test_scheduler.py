"""The scheduler against a symbolic executor: a KV cache that holds, instead of keys and values, the tokens they were computed from.

Whatever position a row reads must hold exactly this stream's own tokens up to there, under its own salt; so a wrong block, a stale
table, a block freed too early or a prefix that does not match cannot go unnoticed. A sampled token is a function of the stream's
tokens, so what each stream must say is known beforehand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.plan import Fill, StepPlan, StepResult, TopLogprobs
from penstock.engine.request import Request, Sampler
from penstock.engine.scheduler import Commit, Ended, Scheduler, SchedulerConfig

VOCABULARY = 4
NOTHING = np.empty(0, np.int32)


@lru_cache(maxsize=100_000)
def next_token(tokens: tuple[int, ...]) -> int:
    return (crc32(bytes(tokens)) >> 9) % VOCABULARY


@lru_cache(maxsize=10_000)
def text_of(prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """A prompt and what follows it, without an end."""
    tokens = prompt
    while len(tokens) < length:
        tokens = (*tokens, next_token(tokens))
    return tokens


def make_request(
    handle: int, prompt: list[int], limit: int = 4, *, attempt: int = 1, generated: tuple[int, ...] = (), stops: tuple[int, ...] = (),
    prompt_logprobs: bool = False, logprobs: bool = False, penalty: bool = False, **rest: object,
) -> Request:  # fmt: skip
    sampler = Sampler(
        seed=handle * 1000 + attempt, stop_ids=stops, prompt_logprobs=0 if prompt_logprobs else -1, logprobs=0 if logprobs else -1,
        presence_penalty=float(penalty),
    )  # fmt: skip
    ids, before = np.array(prompt, np.int32), np.array(generated, np.int32)
    return Request(handle=handle, attempt=attempt, prompt=ids, generated=before, limit=limit, sampler=sampler, **rest)  # type: ignore[arg-type]


# ── the executor ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Occupant:
    request: Request
    length: int  # tokens that exist, on the host or only on the device
    fill: Fill
    computed: int | None = None  # before its first row: unknown, the cached prefix is not the executor's business


class SymbolicExecutor:
    """Runs plans in order, and finds fault with each."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.table: dict[tuple[int, int], int] = {}  # (slot, column) → block, never cleaned: stale entries must not matter
        self.cache: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}  # (block, offset) → (salt, tokens up to this one)
        self.last: dict[int, int] = {}  # slot → token sampled last
        self.occupants: dict[int, Occupant] = {}

    def place(self, slot: int, position: int) -> tuple[int, int]:
        block = self.table[slot, position // self.config.block_size]
        assert 0 <= block < self.config.blocks
        return block, position % self.config.block_size

    def total(self, request: Request) -> int:
        most = min(self.config.max_model_len, self.config.blocks * self.config.block_size + 1)
        return min(len(request.prompt) + request.limit, most)

    def run(self, plan: StepPlan, open_streams: dict[int, Stream]) -> tuple[StepResult, list[int]]:
        """Returns also whose token each sampled id is."""
        assert plan.slots.dtype == plan.starts.dtype == plan.counts.dtype == plan.tokens.dtype == np.int32
        assert plan.table_slots.dtype == plan.table_columns.dtype == plan.table_blocks.dtype == np.int32
        rows = list(zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), plan.samples.tolist(), strict=True))
        assert 0 < plan.query_tokens == int(plan.counts.sum()) <= self.config.token_budget
        assert len(rows) == len({slot for slot, *_ in rows}) <= self.config.slots
        entries = list(zip(plan.table_slots.tolist(), plan.table_columns.tolist(), strict=True))
        assert len(entries) == len(set(entries)), "which of the two is written last is not defined"
        for fill in plan.fills:
            self._fill(fill, open_streams)
        self.table.update(zip(entries, plan.table_blocks.tolist(), strict=True))
        tokens, inputs = deque(plan.tokens.tolist()), []
        for index, (slot, _, count, samples) in enumerate(rows):
            if index < plan.decodes:
                assert count == 1
                assert samples
                inputs.append([self.last[slot]])
            else:
                inputs.append([tokens.popleft() for _ in range(count)])
        # In each layer all keys are written before any is read.
        written = set()
        for (slot, start, count, _), ids in zip(rows, inputs, strict=True):
            request = self.occupants[slot].request
            text = text_of(tuple(request.prompt.tolist()), start + count)
            assert tuple(ids) == text[start : start + count]
            for position in range(start, start + count):
                place = self.place(slot, position)
                assert place not in written
                written.add(place)
                self.cache[place] = (request.salt, text[: position + 1])
        ids, owners, parts = [], [], []
        for index, (slot, start, count, samples) in enumerate(rows):
            occupant = self.occupants[slot]
            request, end = occupant.request, start + count
            text = text_of(tuple(request.prompt.tolist()), end + 1)
            for position in range(end):
                assert self.cache[self.place(slot, position)] == (request.salt, text[: position + 1])
            if occupant.computed is None:
                assert start % self.config.block_size == 0
                assert start == 0 or (self.config.prefix_cache and occupant.fill.sampler.prompt_logprobs < 0)
            else:
                assert start == occupant.computed
            occupant.computed = end
            assert samples == (end == occupant.length)
            assert end <= occupant.length
            if samples:
                self.last[slot] = text[end]
                occupant.length += 1
                assert occupant.length <= self.total(request)
                ids.append(text[end])
                owners.append(request.sampler.seed)
            if occupant.fill.sampler.prompt_logprobs >= 0:
                history = occupant.fill.history.tolist()
                parts += [(index, history[at + 1], at) for at in range(start, min(end, len(request.prompt) - 1))]
        return StepResult(plan.step, np.array(ids, np.int32), _chosen(ids), _prompt_part(parts)), owners

    def _fill(self, fill: Fill, open_streams: dict[int, Stream]) -> None:
        assert 0 <= fill.slot < self.config.slots
        stream = open_streams[fill.sampler.seed // 1000]
        request, known = stream.request, [*stream.request.prompt.tolist(), *stream.out]
        assert request.sampler.seed == fill.sampler.seed
        assert fill.prompt_tokens == len(request.prompt)
        wants_prompt = request.sampler.prompt_logprobs >= 0 and not stream.out
        assert fill.sampler == (request.sampler if wants_prompt else replace(request.sampler, prompt_logprobs=-1))
        assert fill.history.tolist() == (known if wants_prompt or request.sampler.counts_tokens else [])
        self.occupants[fill.slot] = Occupant(request, len(known), fill)


def _chosen(ids: list[int]) -> TopLogprobs:
    rows = np.arange(len(ids), dtype=np.int32)
    return TopLogprobs(rows, np.array(ids, np.int32).reshape(-1, 1), np.zeros((len(ids), 1), np.float32), np.ones(len(ids), np.int32))


def _prompt_part(parts: list[tuple[int, int, int]]) -> TopLogprobs | None:
    """(row, id, position) each; the position travels as the value."""
    if not parts:
        return None
    rows, ids, positions = (np.array(column, np.int32) for column in zip(*parts, strict=True))
    return TopLogprobs(rows, ids.reshape(-1, 1), positions.reshape(-1, 1).astype(np.float32), positions)


# ── an engine around it ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stream:
    """What the world knows of an open stream."""

    request: Request
    arrived: float
    out: list[int]  # generated so far, from before this attempt too
    told_prompt: bool = False
    aborted: bool = False
    produced: bool = False  # a token, in this attempt


@dataclass
class World:
    """Drives a scheduler and its executor, and knows what every stream must say and why it must end."""

    config: SchedulerConfig
    depth: int = 0
    now: float = 0.0
    scheduling: Callable[[SchedulerConfig], Scheduler] = Scheduler
    plans: list[StepPlan] = field(default_factory=list)
    ends: dict[tuple[int, int], Ended] = field(default_factory=dict)  # (handle, attempt)
    outputs: dict[int, list[int]] = field(default_factory=dict)  # of streams that ended

    def __post_init__(self) -> None:
        self.scheduler = self.scheduling(self.config)
        self.executor = SymbolicExecutor(self.config)
        self.open: dict[int, Stream] = {}
        self.results: deque[tuple[StepResult, list[int]]] = deque()
        self.work = 0  # tokens that all the streams could have in all

    def reference(self, request: Request) -> tuple[list[int], str]:
        """All that a request generates, and why it ends."""
        total = self.executor.total(request)
        out = list(text_of(tuple(request.prompt.tolist()), total)[len(request.prompt) :])
        for at in range(len(request.generated), len(out)):
            if out[at] in request.sampler.stop_ids:
                return out[: at + 1], "stop"
        return out, "length"

    def submit(self, request: Request) -> None:
        known = len(request.prompt) + len(request.generated)
        capacity = self.config.blocks * self.config.block_size
        if not len(request.prompt) or known >= self.config.max_model_len or known > capacity or len(request.generated) >= request.limit:
            before = self.scheduler.open_handles()
            with pytest.raises(ValueError, match="cannot run"):
                self.scheduler.submit(request, self.now)
            assert self.scheduler.open_handles() == before
            return
        self.scheduler.submit(request, self.now)
        old = self.open.get(request.handle)
        if old is None or old.request.attempt < request.attempt:
            self.open[request.handle] = Stream(request, self.now, request.generated.tolist())
            self.work += self.executor.total(request)
        self.check()

    def abort(self, handle: int) -> None:
        if handle in self.open:
            self.open[handle].aborted = True
        self.scheduler.abort(handle, self.now)
        self.end(self.scheduler.take_ended())
        self.check()

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now)
        self.end(self.scheduler.take_ended())
        for stream in self.open.values():
            assert stream.request.deadline is None or stream.request.deadline > self.now
        if plan is None:
            assert self.results or not self.open, "nothing runs, and nothing will change that"
        else:
            assert plan.step == len(self.plans)
            self.plans.append(plan)
            self.results.append(self.executor.run(plan, self.open))
        self.check()
        return plan

    def commit(self) -> Commit:
        result, owners = self.results.popleft()
        commit = self.scheduler.commit(result, self.now)
        columns = (commit.handles, commit.attempts, commit.offsets, commit.ids, commit.rows)
        assert [column.dtype for column in columns] == [np.int64, np.int32, np.int32, np.int32, np.int32]
        for handle, attempt, top in commit.prompt_logprobs:
            stream = self.open[handle]
            assert stream.request.attempt == attempt
            assert not stream.told_prompt
            assert not stream.out
            stream.told_prompt = True
            assert top.ids[:, 0].tolist() == stream.request.prompt[1:].tolist()
            assert top.values[:, 0].tolist() == top.ranks.tolist() == list(range(len(stream.request.prompt) - 1))
        for handle, attempt, offset, token, row in zip(*(column.tolist() for column in columns), strict=True):
            stream = self.open[handle]
            assert attempt == stream.request.attempt
            assert owners[row] == stream.request.sampler.seed
            assert result.ids[row] == token
            assert offset == len(stream.out)
            stream.out.append(token)
            stream.produced = True
            expected, _ = self.reference(stream.request)
            assert stream.out == expected[: len(stream.out)]
            assert stream.told_prompt or stream.request.sampler.prompt_logprobs < 0 or len(stream.request.prompt) == 1 or offset
        self.end(commit.ended)
        self.check()
        return commit

    def end(self, ended: list[Ended]) -> None:
        for end in ended:
            stream = self.open.pop(end.handle)
            request = stream.request
            assert end.attempt == request.attempt
            expected, reason = self.reference(request)
            if end.reason == "cancelled":
                assert stream.aborted
            elif end.reason == "deadline":
                assert request.deadline is not None
                assert request.deadline <= self.now
            elif end.reason == "queue_timeout":
                assert request.queue_timeout is not None
                assert request.queue_timeout <= self.now
                assert not stream.produced
            else:
                assert (stream.out, end.reason) == (expected, reason)
            assert min(end.queue_s, end.prefill_s, end.decode_s) >= 0
            assert end.queue_s + end.prefill_s + end.decode_s == self.now - stream.arrived
            assert end.cached_tokens % self.config.block_size == 0
            assert end.cached_tokens < len(request.prompt) + max(1, len(request.generated))
            assert self.config.prefix_cache or not end.cached_tokens
            self.ends[end.handle, end.attempt] = end
            self.outputs[end.handle] = stream.out

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.pool.check()
        assert sorted(scheduler.open_handles()) == sorted(self.open)
        assert scheduler.in_flight == len(self.results)
        assert 0 <= scheduler.running <= self.config.slots
        assert 0 <= scheduler.waiting == len(self.open) - scheduler.running

    def step(self) -> None:
        """As many plans as look-ahead allows, then one result."""
        while len(self.results) <= self.depth and self.plan() is not None:
            pass
        if self.results:
            self.commit()

    def drain(self) -> None:
        """To the end of everything, in a number of steps that bounds all the work there is, done again after every token."""
        steps = 0
        while self.open or self.results:
            self.step()
            steps += 1
            assert steps <= 20 + self.work * (2 + self.depth + max(self.config.max_model_len // self.config.token_budget, 1))
        assert self.scheduler.plan(self.now) is None
        assert self.scheduler.running == self.scheduler.waiting == 0
        assert self.scheduler.pool.available == self.config.blocks
        self.scheduler.pool.check()
        counters = self.scheduler.counters
        assert counters.steps == len(self.plans)
        assert counters.rows == sum(len(plan.slots) for plan in self.plans)
        assert counters.query_tokens == sum(plan.query_tokens for plan in self.plans)


# ── random lives ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIGS = st.builds(
    SchedulerConfig,
    slots=st.integers(1, 6),
    blocks=st.integers(3, 16),
    block_size=st.sampled_from([1, 2, 2, 3, 4]),
    token_budget=st.one_of(st.integers(1, 6), st.integers(6, 40)),
    max_model_len=st.integers(6, 24),
    prefix_cache=st.booleans(),
    quantum=st.sampled_from([0, 1, 2, 5, 64]),
)


@dataclass(frozen=True)
class Submit:
    prompt: list[int]
    follows: int | None  # begin with what this earlier stream was given and said
    limit: int
    stops: tuple[int, ...]
    flags: tuple[bool, bool, bool]  # prompt log-probabilities, log-probabilities, penalty
    priority: int
    tenant: str
    salt: bytes
    deadline: int | None
    queue_timeout: int | None


@dataclass(frozen=True)
class Again:
    which: int
    newer: int  # how much newer the attempt is
    keep: int  # generated tokens that were not lost


@dataclass(frozen=True)
class Abort:
    which: int


@dataclass(frozen=True)
class Wait:
    seconds: int


@dataclass(frozen=True)
class Move:
    """A plan if look-ahead allows it, or else a result if there is one; some times over."""

    plan: bool
    times: int


Operation = Submit | Again | Abort | Wait | Move

RARELY = st.sampled_from([False, False, False, True])
SELDOM = st.sampled_from([None] * 12 + [0, 1, 5, 20])
SUBMITS = st.builds(
    Submit,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
    follows=st.none() | st.integers(0, 9),
    limit=st.integers(1, 16),
    stops=st.sampled_from([(), (), (3,), (2, 3), (5, 6, 7, 8, 9, 3)]),
    flags=st.tuples(RARELY, RARELY, RARELY),
    priority=st.sampled_from([0, 0, 0, 1, 2, -1]),
    tenant=st.sampled_from("aabc"),
    salt=st.sampled_from([b"", b"", b"", b"other"]),
    deadline=SELDOM,
    queue_timeout=SELDOM,
)
MOVES = st.builds(Move, st.sampled_from([True, True, False]), st.integers(1, 6))
OPERATIONS = st.lists(
    st.one_of(
        SUBMITS,
        SUBMITS,
        st.builds(Again, st.integers(0, 20), st.sampled_from([-1, 0, 1, 1, 1, 2]), st.integers(0, 12)),
        st.builds(Abort, st.integers(0, 20)),
        st.builds(Wait, st.integers(0, 4)),
        MOVES,
        MOVES,
        MOVES,
    ),
    min_size=20,
    max_size=60,
)


def live(
    config: SchedulerConfig, depth: int, operations: list[Operation], scheduling: Callable[[SchedulerConfig], Scheduler] = Scheduler
) -> World:
    world = World(config, depth, scheduling=scheduling)
    requests: list[Request] = []  # by handle, the newest attempt of each
    for operation in operations:
        match operation:
            case Submit():
                prompt = operation.prompt
                if operation.follows is not None and requests:
                    before = requests[operation.follows % len(requests)].prompt.tolist()
                    prompt = [*text_of(tuple(before), len(before) + operation.follows), *prompt[1:]]
                prompt_logprobs, logprobs, penalty = operation.flags
                request = make_request(
                    len(requests), prompt, operation.limit, stops=operation.stops, prompt_logprobs=prompt_logprobs, logprobs=logprobs,
                    penalty=penalty, priority=operation.priority, tenant=operation.tenant, salt=operation.salt,
                    deadline=None if operation.deadline is None else world.now + operation.deadline,
                    queue_timeout=None if operation.queue_timeout is None else world.now + operation.queue_timeout,
                )  # fmt: skip
                requests.append(request)
                world.submit(request)
            case Again() if requests:
                handle = operation.which % len(requests)
                request = requests[handle]
                if handle not in world.open and operation.newer <= 0:
                    continue  # nobody sends an attempt again that is over
                said = world.open[handle].out if handle in world.open else world.outputs.get(handle, [])
                attempt = request.attempt + operation.newer
                keep = min(operation.keep, len(said), len(world.reference(request)[0]) - 1) if len(request.prompt) else 0
                again = replace(
                    request, attempt=attempt, generated=np.array(said[: max(keep, 0)], np.int32),
                    sampler=replace(request.sampler, seed=handle * 1000 + attempt), deadline=None, queue_timeout=None,
                )  # fmt: skip
                world.submit(again)
                if operation.newer > 0:
                    requests[handle] = again
            case Abort():
                world.abort(operation.which)
            case Wait():
                world.now += operation.seconds
            case Move():
                for _ in range(operation.times):
                    if operation.plan and len(world.results) <= depth and world.plan() is not None:
                        continue
                    if world.results:
                        world.commit()
    world.drain()
    return world


@settings(max_examples=500, deadline=None)
@given(CONFIGS, st.integers(0, 2), OPERATIONS)
def test_every_stream_says_what_it_would_say_alone_and_ends_once(
    config: SchedulerConfig, depth: int, operations: list[Operation]
) -> None:
    live(config, depth, operations)


def plan_bytes(plan: StepPlan) -> bytes:
    columns = (
        plan.table_slots, plan.table_columns, plan.table_blocks, plan.slots, plan.starts, plan.counts, plan.samples, plan.tokens,
    )  # fmt: skip
    fills = [(fill.slot, fill.prompt_tokens, fill.sampler, fill.history.tobytes()) for fill in plan.fills]
    return repr((plan.step, plan.decodes, fills, [column.tobytes() for column in columns])).encode()


@settings(max_examples=100, deadline=None)
@given(CONFIGS, st.integers(0, 2), OPERATIONS)
def test_the_same_inputs_give_the_same_plans(config: SchedulerConfig, depth: int, operations: list[Operation]) -> None:
    first, second = live(config, depth, operations), live(config, depth, operations)
    assert [plan_bytes(plan) for plan in first.plans] == [plan_bytes(plan) for plan in second.plans]


def life_digest() -> str:
    """Of the plans of one crowded life: many tenants, priorities, preemptions, prefix hits."""
    config = SchedulerConfig(slots=6, blocks=24, block_size=2, token_budget=17, max_model_len=24)
    world = World(config, depth=1)
    for handle in range(40):
        prompt = [handle >> bit & 1 for bit in range(2 + handle % 7)]
        world.submit(make_request(handle, prompt, 3 + handle % 11, tenant=f"tenant {handle % 9}", priority=handle % 3))
        world.step()
    world.drain()
    assert world.scheduler.counters.preemptions
    assert world.scheduler.counters.prefix_hit_tokens
    return f"{crc32(b''.join(plan_bytes(plan) for plan in world.plans)):08x}"


def test_plans_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = f"import runpy; print(runpy.run_path({__file__!r})['life_digest']())"
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        digests.add(subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout)
    assert digests == {life_digest() + "\n"}


# ── priorities ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(world: World, plan: StepPlan) -> dict[int, int]:
    """Handle → query tokens, of each row of the plan that was launched last."""
    handles = (world.executor.occupants[slot].request.handle for slot in plan.slots.tolist())
    return dict(zip(handles, plan.counts.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.integers(0, 2), st.lists(SUBMITS, min_size=1, max_size=8), st.integers(0, 12), st.data())
def test_a_stream_above_all_others_runs_as_if_it_were_alone(
    config: SchedulerConfig, depth: int, others: list[Submit], steps: int, data: st.DataObject
) -> None:
    world = World(config, depth)
    for handle, other in enumerate(others):
        world.submit(make_request(handle, other.prompt, other.limit, stops=other.stops, priority=other.priority, tenant=other.tenant))
    for _ in range(steps):
        world.step()
    capacity = min(config.max_model_len - 1, config.blocks * config.block_size)
    prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=capacity), "prompt")
    urgent = make_request(99, prompt, data.draw(st.integers(1, 9), "limit"), priority=3)
    world.submit(urgent)
    left = world.executor.total(urgent) - 1  # tokens to compute: the last one is only sampled
    cached = None
    while left and 99 in world.open:
        if len(world.results) <= depth:
            plan = world.plan()
            assert plan is not None
            rows = rows_of(world, plan)
            if cached is None:
                cached = int(plan.starts[list(rows).index(99)])
                left -= cached
            to_prefill = max(0, left - (world.executor.total(urgent) - 1 - len(prompt)))
            assert rows[99] == max(1, min(config.token_budget, to_prefill))
            left -= rows[99]
        else:
            world.commit()
    world.drain()
    assert world.ends[99, 1].preemptions == 0


def test_a_higher_priority_is_admitted_first() -> None:
    world = World(SchedulerConfig(slots=1, blocks=8, block_size=2, max_model_len=16))
    for handle, priority in enumerate([0, 2, 1]):
        world.submit(make_request(handle, [0, 1], priority=priority))
    world.drain()
    assert [handle for handle, _ in world.ends] == [1, 2, 0]
    assert world.scheduler.counters.preemptions == 0


def test_a_higher_priority_takes_the_slot_of_the_newest_of_the_lowest() -> None:
    world = World(SchedulerConfig(slots=3, blocks=24, block_size=2, max_model_len=16))
    for handle, priority in enumerate([0, 0, 1]):
        world.submit(make_request(handle, [handle & 1, 1], 9, priority=priority))
    world.step()
    world.submit(make_request(3, [1, 1, 1], 9, priority=2))
    plan = world.plan()
    assert plan is not None
    assert sorted(rows_of(world, plan)) == [0, 2, 3]
    world.drain()
    assert {handle: end.preemptions for (handle, _), end in world.ends.items()} == {0: 0, 1: 1, 2: 0, 3: 0}


def test_an_equal_priority_preempts_nobody_to_be_admitted() -> None:
    world = World(SchedulerConfig(slots=1, blocks=24, block_size=2, max_model_len=16))
    world.submit(make_request(0, [0, 1], 9))
    world.step()
    world.submit(make_request(1, [1, 1], 2))
    world.drain()
    assert [handle for handle, _ in world.ends] == [0, 1]
    assert world.scheduler.counters.preemptions == 0


def test_nobody_yields_in_vain() -> None:
    world = World(SchedulerConfig(slots=4, blocks=10, block_size=2, max_model_len=20))
    world.submit(make_request(0, [1] * 12, 2, priority=2))
    world.submit(make_request(1, [0, 1], 9, priority=0))
    world.step()
    world.submit(make_request(2, [0] * 14, 2, priority=1))  # needs 7 blocks; stream 0 keeps 6 or 7 of the 10
    world.plan()
    assert world.scheduler.counters.preemptions == 0
    world.drain()


def test_when_blocks_run_out_the_newest_yields_and_the_oldest_never_does() -> None:
    world = World(SchedulerConfig(slots=3, blocks=6, block_size=2, max_model_len=12), depth=2)
    for handle in range(3):
        world.submit(make_request(handle, [handle & 1, handle >> 1], 9))
    world.drain()
    preemptions = {handle: end.preemptions for (handle, _), end in world.ends.items()}
    assert preemptions[0] == 0
    assert preemptions[2] > 0


def test_a_stream_may_fill_the_whole_pool_without_yielding() -> None:
    world = World(SchedulerConfig(slots=2, blocks=3, block_size=2, max_model_len=16), depth=2)
    world.submit(make_request(0, [0, 1, 1], 9))
    world.drain()
    assert len(world.outputs[0]) == 4  # 6 tokens in the cache, and one that is only sampled
    assert world.scheduler.counters.preemptions == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_a_preempted_stream_comes_back_before_those_that_never_ran(depth: int) -> None:
    world = World(SchedulerConfig(slots=1, blocks=24, block_size=2, max_model_len=16), depth)
    world.submit(make_request(0, [0, 1], 9))
    world.submit(make_request(1, [1, 1], 2))
    world.step()
    world.submit(make_request(2, [1, 0], 2, priority=1))
    world.drain()
    assert [handle for handle, _ in world.ends] == [2, 0, 1]
    assert world.ends[0, 1].preemptions == 1


def test_decodes_take_turns_where_a_higher_priority_leaves_too_few_tokens() -> None:
    world = World(SchedulerConfig(slots=3, blocks=24, block_size=2, token_budget=2, max_model_len=16))
    for handle in range(2):
        world.submit(make_request(handle, [0], 15))
    world.step()
    world.submit(make_request(2, [1], 10, priority=1))
    while 2 in world.open:
        world.step()
    assert [len(world.open[handle].out) for handle in range(2)] == [6, 6]


def test_running_streams_are_left_blocks_to_grow_into() -> None:
    world = World(SchedulerConfig(slots=4, blocks=32, block_size=2, max_model_len=64, prefix_cache=False))
    world.submit(make_request(0, [0, 1], 9))
    world.step()  # it holds two of the blocks now, or is about to
    world.submit(make_request(1, [1] * 60, 2))
    world.drain()
    assert [handle for handle, _ in world.ends] == [0, 1]
    assert world.scheduler.counters.preemptions == 0


# ── fair shares ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 30), st.integers(0, 2), st.booleans(),
    st.tuples(st.integers(1, 8), st.integers(3, 8)), st.tuples(st.integers(1, 8), st.integers(3, 8)), st.booleans(),
)  # fmt: skip
def test_two_busy_tenants_are_served_alike_whatever_their_requests_cost(
    slots: int, budget: int, depth: int, prefix_cache: bool, a: tuple[int, int], b: tuple[int, int], late: bool
) -> None:
    """Service is prompt tokens computed and tokens sampled. A tenant is ahead by no more than what its running streams had still to
    get when it was last its turn, and it makes no difference whether one was there long before the other."""
    world = World(
        SchedulerConfig(slots=slots, blocks=16 * slots, block_size=2, token_budget=budget, max_model_len=16, prefix_cache=prefix_cache),
        depth,
    )
    served = {"a": 0, "b": 0}
    waiting: dict[str, set[int]] = {"a": set(), "b": set()}  # who never had a slot
    handle = 0

    def crowd(tenant: str, cost: tuple[int, int]) -> None:
        nonlocal handle
        for _ in range(40):
            world.submit(make_request(handle, [handle >> bit & 1 for bit in range(cost[0])], cost[1], tenant=tenant))
            waiting[tenant].add(handle)
            handle += 1

    def step() -> None:
        while len(world.results) <= depth and (plan := world.plan()) is not None:
            for fill in plan.fills:
                request = world.executor.occupants[fill.slot].request
                waiting[request.tenant].discard(request.handle)
            for slot, count in zip(plan.slots[plan.decodes :].tolist(), plan.counts[plan.decodes :].tolist(), strict=True):
                served[world.executor.occupants[slot].request.tenant] += count
        tenants = {handle: stream.request.tenant for handle, stream in world.open.items()}
        for handle in world.commit().handles.tolist():
            served[tenants[handle]] += 1

    crowd("a", a)
    for _ in range(12 if late else 0):
        step()
    crowd("b", b)
    before = dict(served)
    while all(waiting.values()):
        step()
        assert abs((served["a"] - before["a"]) - (served["b"] - before["b"])) <= 2 * slots * max(sum(a), sum(b))


def test_a_tenant_with_many_requests_does_not_delay_one_with_few() -> None:
    world = World(SchedulerConfig(slots=4, blocks=64, block_size=2, max_model_len=16))
    for handle in range(100):
        world.submit(make_request(handle, [0, 1, handle & 1], 5, tenant="crowd"))
    world.step()
    for handle in range(100, 104):
        world.submit(make_request(handle, [1, 1, handle & 1], 5, tenant="visitor"))
    world.drain()
    order = [handle for handle, _ in world.ends]
    assert max(order.index(handle) for handle in range(100, 104)) < 16


def test_slots_of_one_step_are_shared_between_tenants_that_arrive_together() -> None:
    world = World(SchedulerConfig(slots=4, blocks=64, block_size=2, max_model_len=16, prefix_cache=False))
    for handle in range(16):
        world.submit(make_request(handle, [0, 1, handle & 1], 5, tenant="a" if handle < 8 else "b"))
    plan = world.plan()
    assert plan is not None
    assert sorted(rows_of(world, plan)) == [0, 1, 8, 9]


def test_every_token_is_charged_though_its_stream_was_preempted_meanwhile() -> None:
    world = World(SchedulerConfig(slots=3, blocks=6, block_size=2, max_model_len=12), depth=2)
    for handle in range(3):
        world.submit(make_request(handle, [handle & 1, handle >> 1], 9, tenant="a"))
    world.drain()
    assert world.scheduler.counters.preemptions
    prefilled = sum(len(plan.tokens) for plan in world.plans)
    assert world.scheduler._queue._levels[0].served == {"a": prefilled + sum(len(out) for out in world.outputs.values())}


# ── what else a scheduler promises ─────────────────────────────────────────────────────────────────────────────────────────────


CONFIG = SchedulerConfig(slots=4, blocks=16, block_size=4, token_budget=16, max_model_len=32)


@pytest.mark.parametrize(
    "request_",
    [
        make_request(0, []),
        make_request(0, [1] * 32),
        make_request(0, [1] * 31, generated=(1,), limit=9),
        make_request(0, [1], limit=2, generated=(1, 1)),
        make_request(0, [1], limit=0),
    ],
    ids=["empty", "longer than the model allows", "as long as the model allows", "complete", "nothing to generate"],
)
def test_a_request_that_can_never_run_is_refused(request_: Request) -> None:
    scheduler = Scheduler(CONFIG)
    with pytest.raises(ValueError, match="cannot run here"):
        scheduler.submit(request_, 0.0)
    assert not scheduler.open_handles()
    assert scheduler.plan(0.0) is None


def test_a_prompt_that_needs_more_blocks_than_there_are_is_refused() -> None:
    config = SchedulerConfig(slots=4, blocks=3, block_size=4, max_model_len=100)
    world = World(config)
    with pytest.raises(ValueError, match="13 known tokens"):
        world.scheduler.submit(make_request(0, [1] * 13), 0.0)
    assert not world.scheduler.fits(13)
    assert world.scheduler.fits(12)
    world.submit(make_request(0, [1] * 12, 9))
    world.drain()
    assert len(world.outputs[0]) == 1  # and no block for a second token


def test_a_prefix_is_shared_in_the_very_step_that_computes_it() -> None:
    world = World(replace(CONFIG, token_budget=32))
    world.submit(make_request(0, [0, 1, 1, 0, 1, 0, 0, 1, 1]))
    world.submit(make_request(1, [0, 1, 1, 0, 1, 0, 0, 1, 0]))
    plan = world.plan()
    assert plan is not None
    assert plan.counts.tolist() == [9, 1]
    world.drain()
    assert world.ends[1, 1].cached_tokens == 8


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    world = World(CONFIG)
    for handle in range(2):
        world.submit(make_request(handle, [0, 1, 1, 0, 1, 0, 0, 1]))
        world.drain()
    assert world.ends[1, 1].cached_tokens == 4


def test_what_was_generated_is_a_prefix_for_others() -> None:
    world = World(CONFIG)
    world.submit(make_request(0, [0, 1], 16))
    world.drain()
    world.submit(make_request(1, [0, 1, *world.outputs[0]], 2))
    world.drain()
    assert world.ends[1, 1].cached_tokens == 16  # of 18: the last generated token was never computed


def test_what_a_running_stream_generated_is_found_while_it_runs() -> None:
    world = World(CONFIG)
    world.submit(make_request(0, [0, 1], 24))
    for _ in range(12):
        world.step()
    world.submit(make_request(1, [0, 1, *world.open[0].out], 2))
    world.step()
    assert 0 in world.open
    world.drain()
    assert world.ends[1, 1].cached_tokens == 12


@pytest.mark.parametrize("steps", [0, 8], ids=["at once", "soon"])
def test_blocks_that_many_streams_fill_in_the_same_step_are_all_found(steps: int) -> None:
    """A step offers only a few of them; the others follow, at the latest when their stream leaves."""
    world = World(SchedulerConfig(slots=40, blocks=200, block_size=16, max_model_len=64))
    prompts = [[handle >> bit & 1 for bit in range(10)] for handle in range(20)]
    for handle, prompt in enumerate(prompts):
        world.submit(make_request(handle, prompt, 40))
    for _ in range(7 + steps):
        world.step()
    texts = [prompt + world.open[handle].out for handle, prompt in enumerate(prompts)]
    for handle, text in enumerate(texts):
        if not steps:
            world.abort(handle)
        world.submit(make_request(100 + handle, [*text, 0], 1, priority=1))
    world.drain()
    assert [world.ends[100 + handle, 1].cached_tokens for handle in range(20)] == [16] * 20


def test_streams_of_different_salts_share_nothing() -> None:
    world = World(CONFIG)
    for handle, salt in enumerate([b"", b"x", b"x"]):
        world.submit(make_request(handle, [0, 1, 1, 0, 1], salt=salt))
        world.drain()
    assert [world.ends[handle, 1].cached_tokens for handle in range(3)] == [0, 0, 4]


def test_prompt_logprobs_bypass_the_cache_and_come_once_with_the_first_token() -> None:
    world = World(replace(CONFIG, token_budget=3))
    world.submit(make_request(0, [0, 1, 1, 0, 1, 0]))
    world.drain()
    world.submit(make_request(1, [0, 1, 1, 0, 1, 0], prompt_logprobs=True))
    told = []
    while world.open:
        world.plan()
        told.append(len(world.commit().prompt_logprobs))
    assert told == [0, 1, 0, 0, 0]
    assert world.ends[1, 1].cached_tokens == 0


def test_a_result_of_another_step_or_size_is_refused_and_changes_nothing() -> None:
    world = World(CONFIG, depth=1)
    with pytest.raises(ValueError, match="step 0"):
        world.scheduler.commit(StepResult(0, NOTHING), 0.0)
    world.submit(make_request(0, [0, 1]))
    world.plan()
    world.plan()
    with pytest.raises(ValueError, match="step 1"):
        world.scheduler.commit(StepResult(1, np.array([1], np.int32)), 0.0)
    with pytest.raises(ValueError, match="out of memory"):
        world.scheduler.commit(StepResult(0, NOTHING, error="out of memory"), 0.0)
    world.drain()
    assert len(world.outputs[0]) == 4


def test_a_newer_attempt_carries_on_where_the_older_one_was_released_to() -> None:
    world = World(CONFIG, depth=2)
    world.submit(make_request(0, [0, 1], 9))
    for _ in range(4):
        world.step()
    assert len(world.open[0].out) == 4
    world.submit(make_request(0, [0, 1], 9, attempt=2, generated=tuple(world.open[0].out[:3])))
    world.submit(make_request(0, [0, 1], 9, attempt=1))
    world.submit(make_request(0, [0, 1], 9, attempt=2))
    world.drain()
    assert list(world.ends) == [(0, 2)]
    assert len(world.outputs[0]) == 9


def test_a_deadline_ends_a_stream_that_runs_and_a_queue_timeout_does_not() -> None:
    world = World(CONFIG)
    world.submit(make_request(0, [0, 1], 16, deadline=5.0, queue_timeout=2.0))
    world.step()
    world.now = 3.0
    world.step()
    assert 0 in world.open
    world.now = 5.0
    world.drain()
    assert world.ends[0, 1].reason == "deadline"
    assert len(world.outputs[0]) == 2


def test_whoever_waits_longer_than_its_queue_timeout_ends() -> None:
    world = World(replace(CONFIG, slots=1))
    world.submit(make_request(0, [0, 1], 16))
    world.submit(make_request(1, [0, 1], 16, queue_timeout=2.0))
    world.step()
    world.now = 2.0
    world.drain()
    assert world.ends[1, 1].reason == "queue_timeout"
    assert world.ends[1, 1].queue_s == 2.0


def test_a_preempted_stream_keeps_the_results_that_were_in_flight() -> None:
    world = World(SchedulerConfig(slots=1, blocks=16, block_size=2, max_model_len=24), depth=2)
    world.submit(make_request(0, [0, 1], 12))
    for _ in range(3):
        world.plan()
    world.commit()
    world.submit(make_request(1, [1, 1], 3, priority=1))
    assert world.plan() is not None
    assert world.scheduler.counters.preemptions == 1
    assert [len(world.commit().ids) for _ in range(2)] == [1, 1]
    assert len(world.open[0].out) == 3
    world.drain()
    (fill,) = (fill for plan in world.plans[4:] for fill in plan.fills)
    assert fill.sampler.seed == 1


def test_what_ended_in_time_is_not_kept_until_its_deadline() -> None:
    world = World(CONFIG)
    for handle in range(5000):
        world.scheduler.submit(make_request(handle, [0], 1, deadline=1e9), 0.0)
        world.scheduler.abort(handle, 0.0)
    assert len(world.scheduler._deadlines) <= 1024
    assert sum(level.waiting for level in world.scheduler._queue._levels.values()) <= 4096
