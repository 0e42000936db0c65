"""How many plans the scheduler actor sends before the results of earlier ones are back."""

from __future__ import annotations

from penstock.actors.scheduler import SHORT_S, plans_ahead


def test_one_plan_is_ahead_and_one_more_where_steps_are_short_and_run_beside_the_host() -> None:
    assert plans_ahead(None, SHORT_S, beside=True) == 1
    assert plans_ahead(None, 0.5 * SHORT_S, beside=True) == 2
    assert plans_ahead(None, 0.5 * SHORT_S, beside=False) == 1


def test_whoever_asks_for_a_number_gets_it() -> None:
    found = [plans_ahead(asked, seconds, beside=True) for asked in (0, 1, 2) for seconds in (0.0, 1.0)]
    assert found == [0, 0, 1, 1, 2, 2]
