"""Steps that a runner runs before its first request: to compile and to allocate, and to see what memory the largest take."""

from __future__ import annotations

import time

import numpy as np

from penstock.engine.plan import Fill, StepPlan
from penstock.engine.request import Sampler
from penstock.engine.results import NO_IDS
from penstock.engine.runner import Runner

PAGES = 4  # of a large adapter


def warm_up(runner: Runner) -> float:
    """Run a prefill and decodes, short and long, on slots and blocks that hold nothing yet, so that the first request finds compiled
    kernels and allocated buffers. Returns the seconds that the prefill took for each token. Raises `RuntimeError` if a step fails."""
    # A CPU compiles nothing for a shape, and a full batch would take it seconds, each time that an executor starts.
    rows = min(runner.config.slots, runner.config.blocks, 2 if runner.device.type == "cpu" else runner.config.slots)
    if (graphs := runner.graphs) is not None:
        runner.graphs = None  # to record a step does not run it: what a library or a model makes when it is first used must be there before
        _rehearse(runner, 1, 1, Sampler())
        runner.graphs = graphs
    begun = time.perf_counter()
    _rehearse(runner, rows, runner.config.block_size, Sampler())
    seconds = time.perf_counter() - begun
    _rehearse(runner, rows, 1, Sampler(temperature=1.0))
    _rehearse(runner, 1, 1, Sampler(), start=min(runner.config.columns, runner.config.blocks) * runner.config.block_size - 1)
    if runner.adapters is not None and runner.device.type == "cuda":  # or the first adapter would hold everybody up
        for tokens in (runner.config.block_size, 1):
            _rehearse(runner, rows, tokens, Sampler(), pages=1)
    return seconds / (rows * runner.config.block_size)


def run_worst_case(runner: Runner, token_budget: int) -> None:
    """Run the steps that take the most memory: `token_budget` tokens in prefill chunks, and all slots sampling with every filter, each
    with an adapter of its own. Overwrites the pool. Raises `RuntimeError` if a step fails."""
    size, columns, pages = runner.config.block_size, runner.config.columns, min(PAGES, runner.config.adapter_pages)
    most = min(token_budget, runner.config.blocks * size)
    _rehearse(runner, 1, min(most, columns * size), Sampler())
    rows = min(runner.config.slots, most, runner.config.blocks)
    share = min(most // rows, columns * size, runner.config.blocks // rows * size)
    _rehearse(runner, rows, max(share, 1), Sampler(temperature=1.0, top_p=0.9, min_p=0.1), pages=pages)


def _rehearse(runner: Runner, rows: int, tokens: int, sampler: Sampler, start: int = 0, pages: int = 0) -> None:
    """One step of `rows` rows of `tokens` new tokens each, from position `start` on, in the first slots and blocks; both are free again
    afterwards. The keys before `start` are whatever lies there. `pages`: those of each row's adapter, in which nothing is yet."""
    each = -(-(start + tokens) // runner.config.block_size)
    slots = np.arange(rows, dtype=np.int32)
    decodes = rows if tokens == 1 else 0
    plan = StepPlan(
        step=-1,
        fills=tuple(Fill(slot, 0, sampler, NO_IDS, _some_pages(runner, slot, pages)) for slot in range(rows)),
        table_slots=np.repeat(slots, each),
        table_columns=np.tile(np.arange(each, dtype=np.int32), rows),
        table_blocks=np.arange(rows * each, dtype=np.int32) % runner.config.blocks,
        slots=slots,
        starts=np.full(rows, start, np.int32),
        counts=np.full(rows, tokens, np.int32),
        decodes=decodes,
        samples=np.ones(rows, np.bool_),
        tokens=np.zeros(0 if decodes else rows * tokens, np.int32),
    )
    result = runner.launch(plan).result()
    for slot in range(rows):
        runner.sampler.fill(Fill(slot, 0, Sampler(), NO_IDS))
        if runner.adapters is not None:
            runner.adapters.fill(slot, ())
    if result.error is not None:
        raise RuntimeError(f"a rehearsal of {rows} rows of {tokens} tokens failed: {result.error}")


def _some_pages(runner: Runner, slot: int, count: int) -> tuple[int, ...]:
    """Others for each slot, as long as there are others: who has the same has the same adapter."""
    return tuple((slot + number) % runner.config.adapter_pages for number in range(count))
