"""When an actor counts as stalled: by what it does, not by what its socket says."""

from __future__ import annotations

from penstock.actors.actor import Post
from penstock.actors.config import EngineConfig
from penstock.actors.worker import Worker


class Known(Worker):
    def gone(self) -> bool:
        return False

    def death(self) -> str:
        return ""


def worker(ready_at: float = 100.0) -> Known:
    made = Known(Post("executor", 0, 1, "inproc://a", "inproc://s", "/tmp", EngineConfig()))
    made.begin({}, ready_at)
    return made


def test_one_that_is_silent_is_stalled() -> None:
    made = worker()
    made.heard(5, {}, 103.0)
    assert made.stalled(112.9, 10.0) is None
    assert made.stalled(114.0, 10.0) == 11.0


def test_one_whose_steps_take_long_may_be_silent_for_long() -> None:
    made = worker()
    made.begin({"step_s": 20.0}, 100.0)
    made.heard(5, {}, 103.0)
    assert made.stalled(262.0, 10.0) is None
    assert made.stalled(264.0, 10.0) == 161.0


def test_one_that_beats_but_does_not_get_on_with_its_work_is_stalled() -> None:
    made = worker()
    for second in range(1, 30):
        made.heard(7, {"in_flight": 2}, 100.0 + second)
    assert made.stalled(129.0, 10.0) == 28.0
    made.heard(8, {"in_flight": 2}, 130.0)
    assert made.stalled(131.0, 10.0) is None


def test_one_that_has_nothing_to_do_is_not_stalled() -> None:
    made = worker()
    for second in range(1, 30):
        made.heard(7, {"in_flight": 0}, 100.0 + second)
    assert made.stalled(130.0, 10.0) is None


def test_one_that_is_still_loading_is_not_stalled() -> None:
    made = worker()
    made.ready = False
    assert made.stalled(1e6, 10.0) is None


def test_one_that_never_gets_ready_is_late_whether_or_not_it_ever_said_a_word() -> None:
    made = worker()
    made.ready, made.begun = False, 100.0
    for made.up in (False, True):
        assert made.late(399.0, 300.0) is None
        assert made.late(401.0, 300.0) == 301.0
    made.begin({}, 402.0)
    assert made.late(1e6, 300.0) is None
