"""What an executor reports of its steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.spans import HostMark, Span, SpanClock
from penstock.engine.steptimes import LAST, StepTimes

NONE = np.empty(0, np.int32)


def plan(decodes: int, chunk: int = 0) -> StepPlan:
    rows = decodes + (chunk > 0)
    counts = np.array([1] * decodes + [chunk] * (chunk > 0), np.int32)
    slots = np.arange(rows, dtype=np.int32)
    return StepPlan(0, (), NONE, NONE, NONE, slots, slots, counts, decodes, np.ones(rows, np.bool_), np.zeros(chunk, np.int32))


def result(ran: float | None = None, idle: float = 0.0) -> StepResult:
    return StepResult(0, NONE, device_seconds=ran, idle_seconds=idle)


def test_nothing_is_said_of_no_steps() -> None:
    assert StepTimes().figures() == {}


def test_a_decode_step_begins_when_the_one_before_it_is_done_or_when_it_is_launched() -> None:
    times = StepTimes()
    first = times.launched(plan(10), 1.0, 1.1, flying=False)
    second = times.launched(plan(10), 1.2, 1.3, flying=True)
    times.done(first, result(), 2.0)
    assert times.figures()["decode_step_s"] == pytest.approx(1.0)
    times.done(second, result(), 2.5)
    times.done(times.launched(plan(10), 3.0, 3.1, flying=False), result(), 3.4)
    assert times.figures()["decode_step_s"] == pytest.approx(0.5)  # the median of 1.0, 0.5 and 0.4


def test_what_comes_after_a_rest_is_told_apart() -> None:
    times = StepTimes()
    times.done(times.launched(plan(10), 1.0, 1.1, flying=False), result(), 2.0)
    times.done(times.launched(plan(3), 4.0, 4.2, flying=False), result(), 4.5)
    figures = times.figures()
    assert (figures["decode_rows"], figures["decode_step_s"]) == (3.0, pytest.approx(0.5))
    assert figures["launch_p50_s"] == pytest.approx(0.2)


def test_only_steps_that_are_nearly_full_and_have_no_chunk_are_decode_steps() -> None:
    times, now = StepTimes(), 0.0
    for decodes, chunk, seconds in ((1, 0, 5.0), (100, 0, 1.0), (91, 0, 1.0), (80, 0, 7.0), (100, 30, 9.0)):
        times.done(times.launched(plan(decodes, chunk), now, now, flying=False), result(), now + seconds)
        now += seconds
    figures = times.figures()
    assert (figures["decode_step_s"], figures["decode_rows"]) == (1.0, 100.0)


def test_launches_are_percentiles_over_the_last_steps() -> None:
    times = StepTimes()
    for number in range(LAST + 100):
        seconds = 9.0 if number < 100 else 1.0 if number % 50 else 3.0
        times.done(times.launched(plan(0, 5), 0.0, seconds, flying=False), result(), 0.0)
    figures = times.figures()
    assert (figures["launch_p50_s"], figures["launch_p99_s"]) == (1.0, 3.0)
    assert "decode_step_s" not in figures


def test_the_device_is_idle_only_while_something_is_to_be_done() -> None:
    times = StepTimes()
    waits = [(plan(0, 5), False, 100.0), (plan(0, 5), True, 0.25), (plan(3), False, 0.5)]  # nobody was there before the first
    for step, flying, idle in waits:
        times.done(times.launched(step, 0.0, 0.0, flying=flying), result(2.0, idle), 0.0)
    figures = times.figures()
    assert (figures["device_s"], figures["idle_s"], figures["device_step_p50_s"]) == (6.0, 0.75, 2.0)


def test_steps_that_are_not_timed_on_the_device_say_nothing_of_it() -> None:
    times = StepTimes()
    times.done(times.launched(plan(3), 0.0, 0.0, flying=False), result(), 1.0)
    assert not times.figures().keys() & {"device_s", "idle_s", "device_step_p50_s"}


def test_a_span_is_the_step_and_the_wait_before_it() -> None:
    marks = []
    for at in (1.0, 3.5, 4.0):
        mark = HostMark()
        mark.at = at
        marks.append(mark)
    assert Span(*marks).read() == pytest.approx((0.5, 2.5))
    assert Span(None, *marks[1:]).read() == pytest.approx((0.5, 0.0))


def test_a_clock_knows_where_the_step_before_ended_and_leaves_out_one_that_did_not_begin() -> None:
    clock = SpanClock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert clock.end() is None
    clock.begin()
    first = clock.end()
    clock.begin()
    second = clock.end()
    assert first is not None
    assert second is not None
    assert first.before is None
    assert second.before is first.end
    assert all(seconds >= 0 for seconds in second.read())
