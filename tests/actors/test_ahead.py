"""How many plans the scheduler actor sends before the results of earlier ones are back."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.actors import scheduler
from penstock.actors.scheduler import SHORT_S, SchedulerActor, plans_ahead


def test_one_plan_is_ahead_and_one_more_where_steps_are_short_and_run_beside_the_host() -> None:
    assert plans_ahead(None, SHORT_S, beside=True) == 1
    assert plans_ahead(None, 0.5 * SHORT_S, beside=True) == 2
    assert plans_ahead(None, 0.5 * SHORT_S, beside=False) == 1


def test_whoever_asks_for_a_number_gets_it() -> None:
    found = [plans_ahead(asked, seconds, beside=True) for asked in (0, 1, 2) for seconds in (0.0, 1.0)]
    assert found == [0, 0, 1, 1, 2, 2]


class Plans:
    """In the place of a scheduler that always has another plan."""

    in_flight = 0

    def plan(self, now: float) -> object:
        self.in_flight += 1
        return self

    def commit(self, result: object, now: float) -> object:
        self.in_flight -= 1
        return result

    def take_loads(self) -> list[Any]:
        return []


class Desk(SchedulerActor):
    """The actor without its mail."""

    def __init__(self, lookahead: int | None) -> None:
        self.config = SimpleNamespace(lookahead=lookahead)  # type: ignore[assignment]
        self.scheduler = Plans()  # type: ignore[assignment]
        self.ahead, self.beside, self.executor, self.step_seconds, self.spent = 1, True, 7, 0.0, 0.0
        self.post = SimpleNamespace(incarnation=8)  # type: ignore[assignment]
        self.mail = SimpleNamespace(send=lambda *_: None)  # type: ignore[assignment]
        self.commits, self.host_seconds = deque(), deque()
        self.emitted, self.journaled = [0], [0]

    def run(self, step: float, steps: int = 50) -> list[int]:
        """Steps that take so long, one after another. Returns how many plans were out before each result."""
        assert self.scheduler is not None
        found = []
        self._launch()
        for _ in range(steps):
            found.append(self.scheduler.in_flight)
            self._commit(SimpleNamespace(seconds=step * self.scheduler.in_flight, executor=7, scheduler=8))  # type: ignore[arg-type]
        return found


@pytest.mark.parametrize(("lookahead", "step", "out"), [(None, 0.9, 3), (None, 1.1, 2), (0, 0.1, 1), (2, 100.0, 3)])
def test_the_more_plans_are_out_the_longer_each_waits_which_changes_nothing(
    lookahead: int | None, step: float, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "step_from_plan", lambda plan, *_: plan)
    monkeypatch.setattr(scheduler, "result_from_done", lambda done: done)
    desk = Desk(lookahead)
    desk.ahead = plans_ahead(lookahead, SHORT_S, beside=True)
    assert set(desk.run(step * SHORT_S)[1:]) == {out}
