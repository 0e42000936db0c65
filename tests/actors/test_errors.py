"""Refusals say what was wrong, and of what others sent no more than fits a line."""

import pytest

from penstock.actors.config import EngineConfig
from penstock.actors.errors import LONGEST_SHOWN, Refusal, bad
from penstock.actors.keys import new_pair


@pytest.mark.parametrize("value", ["x" * 10_000, ["x"] * 10_000, 10**4000])
def test_a_value_that_is_refused_is_shown_as_far_as_it_fits_a_line(value: object) -> None:
    refusal = bad("name", value, "short")
    assert refusal.fault.value is not None
    assert len(refusal.fault.value) <= LONGEST_SHOWN
    assert len(refusal.fault.message) < LONGEST_SHOWN + 40
    assert refusal.fault.message.startswith("name=")
    assert refusal.fault.message.endswith(": must be short")


def test_a_setting_and_a_name_that_are_too_long_are_cut_too(tmp_path: object) -> None:
    for call in (lambda: EngineConfig(weights="x" * 10_000), lambda: new_pair(tmp_path, "x" * 10_000)):  # type: ignore[arg-type]
        with pytest.raises(Refusal) as caught:
            call()
        assert len(caught.value.fault.message) < 300
        assert caught.value.fault.value == "x" * LONGEST_SHOWN
