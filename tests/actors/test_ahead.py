"""How many plans the scheduler actor sends before the results of earlier ones are back."""

from __future__ import annotations

from penstock.actors.scheduler import SHORT_S, plans_ahead


def test_one_plan_is_ahead_and_one_more_where_steps_are_short() -> None:
    assert plans_ahead(None, SHORT_S) == 1
    assert plans_ahead(None, 0.5 * SHORT_S) == 2


def test_whoever_asks_for_a_number_gets_it() -> None:
    assert [plans_ahead(asked, seconds) for asked in (0, 1, 2) for seconds in (0.0, 1.0)] == [0, 0, 1, 1, 2, 2]
