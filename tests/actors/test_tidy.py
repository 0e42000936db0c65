"""Garbage is collected while nobody waits for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from penstock.actors import tidy as module
from penstock.actors.tidy import IDLE, tidy


class Knot:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def knots() -> weakref.ref[Knot]:
    many = [Knot() for _ in range(2 * IDLE)]
    return weakref.ref(many[0])


def test_who_is_busy_leaves_garbage_and_who_is_idle_collects_it() -> None:
    one = knots()
    tidy(idle=False)
    assert one() is not None
    tidy(idle=True)
    assert one() is None


def test_very_much_of_it_cannot_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY", IDLE)
    one = knots()
    tidy(idle=False)
    assert one() is None


def test_a_process_that_collects_by_itself_is_left_alone() -> None:
    gc.set_threshold(0)
    gc.enable()
    try:
        one = knots()
        tidy(idle=True)
        assert one() is not None
    finally:
        gc.set_threshold(700, 10, 10)
