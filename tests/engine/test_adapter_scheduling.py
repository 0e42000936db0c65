"""Adapters in the scheduler: whoever waits for one holds nobody up, and those that are wanted share what there is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from penstock.engine.plan import StepResult
from penstock.engine.request import Adapter
from penstock.engine.scheduler import Ended, Scheduler, SchedulerConfig

from .driver import request

CONFIG = SchedulerConfig(slots=8, blocks=400, block_size=4, token_budget=64, max_model_len=64, adapter_pages=4, prefix_cache=False)
ONE, TWO, LARGE = (Adapter(bytes([number]), pages) for number, pages in ((1, 1), (2, 1), (3, 4)))


class World:
    """A scheduler, an executor that answers every step, and loads that take `load_s`."""

    def __init__(self, config: SchedulerConfig = CONFIG, load_s: float = 0.0) -> None:
        self.scheduler, self.load_s, self.now, self.handles = Scheduler(config), load_s, 0.0, 0
        self.adapter: dict[int, Adapter | None] = {}
        self.loading: list[tuple[float, int]] = []
        self.tokens: Counter[Adapter | None] = Counter()
        self.first: dict[int, float] = {}
        self.ended: list[Ended] = []
        self.pages: dict[int, tuple[int, ...]] = {}  # by slot

    def submit(self, adapter: Adapter | None, limit: int = 8, tenant: str = "", prompt: int = 4) -> int:
        self.handles += 1
        value = replace(request(self.handles, list(range(prompt)), limit, adapter=adapter), tenant=tenant)
        self.adapter[self.handles] = adapter
        self.scheduler.submit(value, self.now)
        return self.handles

    def step(self, seconds: float = 0.01) -> None:
        self.now += seconds
        for due, number in [one for one in self.loading if one[0] <= self.now]:
            self.loading.remove((due, number))
            self.scheduler.loaded(number, self.now)
        plan = self.scheduler.plan(self.now)
        self.loading += [(self.now + self.load_s, load.number) for load in self.scheduler.take_loads()]
        if plan is None:
            self.ended += self.scheduler.take_ended()
            return
        for fill in plan.fills:
            self.pages[fill.slot] = fill.pages
        commit = self.scheduler.commit(StepResult(plan.step, np.full(int(plan.samples.sum()), 7, np.int32)), self.now)
        for handle in commit.handles.tolist():
            self.first.setdefault(handle, self.now)
            self.tokens[self.adapter[handle]] += 1
        self.ended += commit.ended


def test_whoever_waits_for_an_adapter_holds_nobody_up() -> None:
    world = World(load_s=1e9)
    never = world.submit(ONE)
    others = [world.submit(None) for _ in range(4)]
    for _ in range(12):
        world.step()
    assert {end.handle for end in world.ended} == set(others)
    assert never not in world.first
    assert world.scheduler.waiting == 1


def test_an_adapter_comes_as_soon_as_it_is_asked_for_although_no_slot_is_free() -> None:
    world = World(load_s=0.05)
    for _ in range(8):
        world.submit(None, limit=30)
    world.step()
    late = world.submit(ONE)
    for _ in range(40):
        world.step()
    assert world.scheduler.adapters()[0][:2] == (ONE.digest.hex(), "resident")
    assert late in world.first


def test_a_load_that_fails_ends_those_that_wait_for_it_and_no_others() -> None:
    world = World(load_s=1e9)
    handles = [world.submit(adapter) for adapter in (ONE, TWO, ONE, None)]
    world.scheduler.plan(0.0)
    load = next(load for load in world.scheduler.take_loads() if load.adapter == ONE)
    world.scheduler.lost(load.number, 0.0)
    assert {end.handle: end.reason for end in world.scheduler.take_ended()} == dict.fromkeys((handles[0], handles[2]), "adapter_lost")
    assert set(world.scheduler.open_handles()) == {handles[1], handles[3]}
    world.scheduler.loaded(load.number, 0.0)  # too late
    again = world.submit(ONE)
    world.scheduler.plan(0.0)
    assert [one.adapter for one in world.scheduler.take_loads()] == [ONE]
    assert again in world.scheduler.open_handles()


def test_one_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(CONFIG)
    assert scheduler.pin(ONE, 0.0)
    assert not scheduler.fits_adapter(LARGE)
    with pytest.raises(ValueError, match="does not fit"):
        scheduler.submit(request(1, [1], 1, adapter=LARGE), 0.0)
    scheduler.unpin(ONE.digest)
    scheduler.submit(request(1, [1], 1, adapter=LARGE), 0.0)


def test_a_flood_for_one_adapter_leaves_another_its_share_of_slots() -> None:
    """Slots are scarce: those of the flood's streams that end make room for the other adapter's."""
    world = World()
    for _ in range(60):
        world.submit(ONE, limit=16)
    for _ in range(20):
        world.step()
    for _ in range(20):
        world.submit(TWO, limit=16)
    before = Counter(world.tokens)
    for _ in range(60):
        world.step()
    served = world.tokens - before
    assert served[TWO] > 0.75 * served[ONE]


def test_one_that_needs_all_the_pages_gets_its_turn_beside_others_that_never_end() -> None:
    world = World(load_s=0.02)
    for _ in range(400):
        while world.scheduler.waiting < 6:
            for adapter in (ONE, TWO, LARGE):
                world.submit(adapter, limit=40)
        world.step()
    assert min(world.tokens[adapter] for adapter in (ONE, TWO, LARGE)) > 0.25 * max(world.tokens.values())


def test_streams_run_with_the_pages_of_their_own_adapter() -> None:
    world = World()
    world.submit(ONE)
    world.submit(None)
    world.step()
    world.submit(TWO)
    world.step()
    world.step()
    pages = [world.pages[slot] for slot in sorted(world.pages)]
    assert sorted(map(len, pages)) == [0, 1, 1]
    assert len({page for one in pages for page in one}) == 2


def test_what_one_tenant_is_served_of_the_base_model_is_not_held_against_another() -> None:
    world = World()
    for _ in range(400):
        while world.scheduler.waiting < 20:
            world.submit(None, limit=16, tenant="flood")
        world.step()
        if len(world.adapter) < 3000 and world.handles % 5 == 0:
            world.submit(ONE, limit=16, tenant="quiet")
    base = world.submit(None, limit=4, tenant="quiet")
    for _ in range(60):
        while world.scheduler.waiting < 20:
            world.submit(None, limit=16, tenant="flood")
        world.submit(ONE, limit=16, tenant="quiet")
        world.step()
    assert base in world.first


def test_a_prompt_that_takes_longer_than_a_turn_is_not_begun_again_and_again() -> None:
    """Two adapters, one page, and a prefill of three seconds that no cached prefix shortens."""
    world = World(replace(CONFIG, adapter_pages=1, token_budget=4))
    handles = [world.submit(adapter, limit=4, prompt=40) for adapter in (ONE, TWO)]
    for _ in range(200):
        world.step(0.3)
    assert {end.handle for end in world.ended} == set(handles)
