"""Fair shares, in simulated time: what a tenant gets beside another that asks for as much, and beside one that floods the engine."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.request import Request, Sampler, Tokens
from penstock.engine.scheduler import Scheduler, SchedulerConfig
from penstock.engine.stream import Stream
from penstock.engine.turns import GENEROSITY, LINGER_S, Turns, who_yields

ROUND_TRIP_S = 0.02  # from a stream's end to its client's next request
STEP_S = 0.004  # and once more for every 16 tokens in it


@dataclass(frozen=True)
class Demand:
    """So many streams, always open, each of `prompt` tokens and `output / 2` to `output` more."""

    streams: int
    prompt: int
    output: int


def make_request(handle: int, prompt: Tokens, limit: int, tenant: str) -> Request:
    return Request(handle=handle, attempt=0, prompt=prompt, generated=prompt[:0], limit=limit, sampler=Sampler(), tenant=tenant)


class Simulation:
    """Two tenants with clients that ask again as soon as they are served, and a device that takes longer for larger steps."""

    def __init__(self, config: SchedulerConfig, demands: dict[str, Demand]) -> None:
        self.scheduler = Scheduler(config)
        self.demands = demands
        self.now = 0.0
        self.arrivals: list[tuple[float, int, str]] = []
        self.tenants: dict[int, str] = {}
        self.random = np.random.default_rng(0)
        self.served: Counter[str] = Counter()  # tokens that clients received
        self.computed: Counter[str] = Counter()  # tokens of prompts, once each
        for tenant, demand in demands.items():
            for _ in range(demand.streams):
                self.arrive(0.0 if tenant == "other" else 2.0, tenant)

    def arrive(self, when: float, tenant: str) -> None:
        handle = len(self.tenants)
        self.tenants[handle] = tenant
        heapq.heappush(self.arrivals, (when, handle, tenant))

    def submit(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, handle, tenant = heapq.heappop(self.arrivals)
            demand = self.demands[tenant]
            prompt = self.random.integers(0, 1000, demand.prompt).astype(np.int32)
            limit = int(self.random.integers((demand.output + 1) // 2, demand.output + 1))
            self.scheduler.submit(make_request(handle, prompt, limit, tenant), self.now)

    def run(self, until: float) -> None:
        while self.now < until:
            self.submit()
            plan = self.scheduler.plan(self.now)
            if plan is None:
                self.now = max(self.now, self.arrivals[0][0])
                continue
            self.now += STEP_S * (1 + plan.query_tokens / 16)
            commit = self.scheduler.commit(StepResult(plan.step, np.zeros(int(plan.samples.sum()), np.int32)), self.now)
            for handle, offset in zip(commit.handles.tolist(), commit.offsets.tolist(), strict=True):
                self.served[self.tenants[handle]] += 1
                if not offset:
                    self.computed[self.tenants[handle]] += self.demands[self.tenants[handle]].prompt
            for ended in commit.ended:
                self.arrive(self.now + ROUND_TRIP_S, self.tenants[ended.handle])

    def measure(self, settle: float, seconds: float) -> tuple[float, float]:
        """Tokens a second of the tenant `me`, and its share of all service."""
        self.run(settle)
        served, computed = self.served.copy(), self.computed.copy()
        begun = self.now
        self.run(settle + seconds)
        service = {tenant: self.served[tenant] - served[tenant] + self.computed[tenant] - computed[tenant] for tenant in self.demands}
        return (self.served["me"] - served["me"]) / (self.now - begun), service["me"] / sum(service.values())


MODEST = Demand(16, 32, 64)
LONG = Demand(300, 32, 800)
PROMPTS = Demand(300, 700, 16)
CONFIG = SchedulerConfig(slots=256, blocks=65536, token_budget=512, max_model_len=4096, quantum=16)
SCARCE = [
    pytest.param(replace(CONFIG, slots=32), MODEST, LONG, id="slots"),
    pytest.param(replace(CONFIG, slots=128, blocks=256), MODEST, LONG, id="blocks"),
    pytest.param(replace(CONFIG, slots=32), MODEST, PROMPTS, id="prefill"),
    pytest.param(CONFIG, MODEST, LONG, id="step"),
    pytest.param(CONFIG, MODEST, PROMPTS, id="step by prompts"),
]


@pytest.mark.parametrize(("config", "modest", "flood"), SCARCE)
def test_a_flood_takes_nothing_from_who_asks_for_its_share(config: SchedulerConfig, modest: Demand, flood: Demand) -> None:
    equal, _ = Simulation(config, {"me": modest, "other": modest}).measure(4.0, 6.0)
    beside, _ = Simulation(config, {"me": modest, "other": flood}).measure(4.0, 6.0)
    assert beside >= 0.9 * equal


@pytest.mark.parametrize(("config", "modest", "flood"), SCARCE)
def test_two_floods_share_alike_whoever_came_first(config: SchedulerConfig, modest: Demand, flood: Demand) -> None:
    _, share = Simulation(config, {"me": flood, "other": flood}).measure(6.0, 20.0)
    assert 0.45 <= share <= 0.55


@pytest.mark.parametrize(("config", "modest", "flood"), [param for param in SCARCE if param.id != "blocks"])
def test_two_floods_share_alike_whatever_their_requests_are_like(config: SchedulerConfig, modest: Demand, flood: Demand) -> None:
    """Tokens, that is. Where blocks are scarce it is those that are shared alike, and long streams get fewer tokens out of as many."""
    _, share = Simulation(config, {"me": replace(modest, streams=300), "other": flood}).measure(6.0, 20.0)
    assert 0.45 <= share <= 0.55


def test_a_switch_turns_the_limits_off() -> None:
    config = replace(CONFIG, slots=32, quantum=0)
    equal, _ = Simulation(config, {"me": MODEST, "other": MODEST}).measure(4.0, 6.0)
    beside, _ = Simulation(config, {"me": MODEST, "other": LONG}).measure(4.0, 6.0)
    assert beside < 0.75 * equal


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(64, 512), st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 600)), max_size=60))
def test_nobody_gets_more_than_a_little_more_than_the_others_unless_they_too_want_more(
    quantum: int, most: int, steps: list[dict[str, int]]
) -> None:
    turns = Turns(quantum, most)
    for step, wanted in enumerate(steps):
        allowance = turns.begin(0, wanted, None, 0.0)
        if allowance is None:
            continue
        granted = {tenant: allowance.grant(tenant, tokens, most) for tenant, tokens in wanted.items()}
        for tenant, tokens in granted.items():
            assert 0 < tokens <= wanted[tenant]  # everybody gets on
            assert allowance.left(tenant) >= 0
            assert (tokens < min(wanted[tenant], most)) == (tenant in allowance.hungry)
        turns.end(0, allowance)
        credits = turns._credits[0]
        assert all(min(quantum, most) <= credit <= most for credit in credits.values()), step
        satisfied = {tenant: tokens for tenant, tokens in granted.items() if tenant not in allowance.hungry}
        for tenant in allowance.hungry:
            if allowance.hungry == {tenant}:
                pace = max(satisfied.values(), default=0)
                assert credits[tenant] <= max(quantum, pace + -(-pace // GENEROSITY))


def test_a_tenant_that_is_alone_has_no_limit_and_saves_nothing_up() -> None:
    turns = Turns(8, 512)
    assert turns.begin(0, ["a"], "a", 0.0) is None
    allowance = turns.begin(0, ["a"], "b", 0.01)
    assert allowance is not None
    assert (allowance.left("a"), allowance.left("b")) == (8, 512)
    turns.end(0, allowance)
    assert turns.begin(0, ["a"], None, 0.01 + 2 * LINGER_S) is None


def test_a_tenant_counts_as_busy_between_two_requests_of_its_client() -> None:
    turns = Turns(8, 512)
    turns.begin(0, ["a", "b"], None, 0.0)
    assert turns.begin(0, ["a"], None, LINGER_S / 2) is not None
    assert turns.begin(0, ["a"], None, 2 * LINGER_S) is None


def running(*blocks: int) -> list[Stream]:
    streams = []
    for number, count in enumerate(blocks):
        request = make_request(number, np.zeros(1, np.int32), 1, "a")
        streams.append(Stream(request, number, 0.0, request.prompt, blocks=list(range(count))))
    return streams


def test_the_richest_yields_until_both_have_alike_and_never_in_vain() -> None:
    rich = running(4, 4, 4, 4)
    assert who_yields([], rich, True, 2, 0) == rich[:1]
    assert who_yields(running(1, 1), rich, True, 0, 9) == rich[:1]
    assert who_yields(running(1, 1, 1), rich, True, 0, 9) == []
    assert who_yields([], rich, False, 6, 0) == rich[:2]
    assert who_yields([], rich, False, 9, 0) == []  # it would then hold 9, and the rich one 4
    assert who_yields(running(4), rich, False, 5, 0) == []


def misplaced(scheduler: Scheduler) -> str | None:
    """Which open stream is not in exactly one place, a slot or the queue."""
    running = [stream for stream in scheduler._slots.streams.tolist() if stream is not None]
    lines = [line for level in scheduler._queue._levels.values() for line in level.lines.values()]
    waiting = [stream for line in lines for queue in line.queues.values() for stream in queue if not stream.gone]
    places = Counter(map(id, running + waiting))
    for stream in scheduler._streams.values():
        if places[id(stream)] > 1 or (not places[id(stream)] and not stream.in_flight):
            return f"stream {stream.handle} is in {places[id(stream)]} places"
    return None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_who_yields_to_another_tenant_is_in_one_place_at_a_time(seed: int, lookahead: int) -> None:
    """Slots and blocks are both short: the richest in one is not the richest in the other, so streams of both yield in one step."""
    draw = random.Random(seed)
    scheduler = Scheduler(SchedulerConfig(slots=14, blocks=40, block_size=4, token_budget=256, max_model_len=120, quantum=16))
    launched: deque[StepPlan] = deque()
    handle = 0

    def submit(tenant: str, prompt: int, priority: int = 0) -> None:
        nonlocal handle
        ids = np.array([draw.randrange(9999) for _ in range(prompt)], np.int32)
        scheduler.submit(replace(make_request(handle, ids, 60, tenant), priority=priority), now)
        handle += 1

    now = 0.0
    for tenant, count, prompt in (("b", 2, 40), ("a", 12, 2)):
        for _ in range(count):
            submit(tenant, prompt)
    for step in range(400):
        now += 0.01
        if step == 3 or (step < 200 and draw.random() < 0.1):
            submit(draw.choice("abc"), draw.choice((2, 2, 30)), draw.choice((0, 0, 0, 1)))
        while len(launched) <= lookahead and (plan := scheduler.plan(now)) is not None:
            assert misplaced(scheduler) is None
            launched.append(plan)
        if launched:
            plan = launched.popleft()
            scheduler.commit(StepResult(plan.step, np.zeros(int(plan.samples.sum()), np.int32)), now)
    while launched or scheduler.running or scheduler.waiting:
        now += 0.01
        while len(launched) <= lookahead and (plan := scheduler.plan(now)) is not None:
            launched.append(plan)
        plan = launched.popleft()
        scheduler.commit(StepResult(plan.step, np.zeros(int(plan.samples.sum()), np.int32)), now)
    assert not scheduler.open_handles()


def test_tenants_that_come_and_go_leave_no_credit_behind() -> None:
    turns = Turns(8, 512)
    for number in range(300):
        allowance = turns.begin(0, ["a"], f"{number}", 0.0)
        assert allowance is not None
        allowance.grant(f"{number}", 5, 100)
        turns.end(0, allowance)
    assert len(turns._credits[0]) <= 3
