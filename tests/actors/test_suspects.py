"""Bisection finds those, and only those, whose presence in a step kills the executor."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.actors.suspects import SUSPICIOUS, Suspects


class World:
    """An executor that dies of some streams, with `slots` rows a step; everybody else gets a token a step."""

    def __init__(self, streams: int, poisonous: set[int], slots: int) -> None:
        self.poisonous, self.slots = poisonous, slots
        self.ids = dict.fromkeys(range(streams), 0)
        self.suspects: Suspects[int] = Suspects()
        self.queue = list(self.ids)  # handed over
        self.quarantined: list[int] = []
        self.crashes = 0

    def step(self) -> None:
        row = self.queue[: self.slots]
        if self.poisonous & set(row):
            self.crashes += 1
            guilty = self.suspects.crashed((one, self.ids[one]) for one in row)
            if guilty is not None:
                self.quarantined.append(guilty)
                del self.ids[guilty]
            self.queue = [one for one in self.ids if not self.suspects.holds(one)]
            return
        for one in row:
            self.ids[one] += 1
        self.queue = self.queue[self.slots :] + row
        self.queue += self.suspects.cleared(self.ids.__getitem__)


@given(streams=st.integers(1, 40), data=st.data(), slots=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_the_guilty_are_found_and_the_others_go_on(streams: int, data: st.DataObject, slots: int) -> None:
    poisonous = set(data.draw(st.lists(st.integers(0, streams - 1), max_size=3)))
    world = World(streams, poisonous, slots)
    for _ in range(2000):
        world.step()
        if set(world.quarantined) == poisonous:
            break
    assert set(world.quarantined) == poisonous
    if slots >= streams:  # else chance decides who is there
        assert world.crashes <= len(poisonous) * (SUSPICIOUS + 2 + math.ceil(math.log2(streams)))
    for _ in range(5 * streams):
        world.step()
    assert not any(world.suspects.holds(one) for one in world.ids)
    assert all(world.ids.values())


def test_somebody_who_had_a_token_since_is_no_suspect() -> None:
    suspects: Suspects[str] = Suspects()
    for ids in range(10):
        assert suspects.crashed([("busy", ids), ("new", 0) if ids == 5 else ("other", ids)]) is None
        assert not any(suspects.holds(one) for one in ("busy", "new", "other"))


def test_one_that_ends_while_it_is_suspected_frees_those_who_wait_for_it() -> None:
    suspects: Suspects[str] = Suspects()
    for _ in range(2):
        assert suspects.crashed([("a", 0), ("b", 0), ("c", 0)]) is None
    assert [one for one in "abc" if suspects.holds(one)] == ["c"]
    assert suspects.holds("late")
    assert suspects.forget("a") == []
    assert suspects.forget("b") == ["c"]
    assert suspects.forget("c") == ["late"]
    assert not any(suspects.holds(one) for one in "abc")


def test_the_last_suspect_is_tried_alone_and_only_then_found_guilty() -> None:
    suspects: Suspects[str] = Suspects()
    for _ in range(2):
        assert suspects.crashed([("bad", 0)]) is None
    assert not suspects.holds("bad")
    assert suspects.holds("late")
    assert suspects.crashed([("bad", 0)]) == "bad"
    assert not suspects.holds("late")


def test_one_tried_alone_that_gets_a_token_frees_everybody() -> None:
    suspects: Suspects[str] = Suspects()
    for _ in range(2):
        assert suspects.crashed([("unlucky", 3)]) is None
    assert suspects.holds("late")
    assert suspects.cleared(lambda _: 3) == []
    assert suspects.cleared(lambda _: 4) == ["late"]
    assert not suspects.holds("late")
