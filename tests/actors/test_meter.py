"""The meter: what is fine, what is too much, and that a flood costs nobody else anything."""

from itertools import pairwise

from penstock.actors.meter import BURST_S, FAR, Meter


def test_a_burst_is_fine_then_the_rate_is_and_then_too_much() -> None:
    meter = Meter(8.0, 1e9, 100)
    verdicts = [meter.judge(b"a", 1, 0.0) for _ in range(int(8 * BURST_S) + 5)]
    assert verdicts == ["fine"] * int(8 * BURST_S) + ["too much"] * 5
    assert [meter.judge(b"a", 1, now) for now in (0.0625, 0.125, 0.1875, 0.25)] == ["too much", "fine", "too much", "fine"]
    assert meter.judge(b"b", 1, 0.0) == "fine"


def test_bytes_count_as_messages_do() -> None:
    meter = Meter(1e9, 1000.0, 100)
    assert meter.judge(b"a", 4000, 0.0) == "fine"
    assert meter.judge(b"a", 100, 0.0) == "too much"
    assert meter.judge(b"a", 100, 0.11) == "fine"
    assert meter.judge(b"a", 10**9, 100.0) == "far too much"


def test_what_is_too_much_uses_nothing_up_and_what_is_far_too_much_is_told_once() -> None:
    meter = Meter(8.0, 1e9, 100)
    verdicts = [meter.judge(b"a", 1, 0.0) for _ in range(int(8 * BURST_S * FAR) + 50)]
    assert verdicts.count("fine") == 8 * BURST_S
    assert verdicts.count("far too much") == 50
    assert [meter.warn(b"a") for _ in range(3)] == [True, False, False]
    assert meter.judge(b"a", 1, 0.125) == "fine"
    assert meter.warn(b"a")


def test_each_that_is_refused_is_told_a_time_of_its_own() -> None:
    meter = Meter(8.0, 1e9, 100)
    turns = [meter.turn(b"a") for _ in range(60) if meter.judge(b"a", 1, 0.0) == "too much"]
    assert len(turns) == 28
    assert all(later - sooner == 0.125 for sooner, later in pairwise(turns))
    assert [meter.judge(b"a", 1, turn) for turn in turns] == ["fine"] * 28


def test_it_remembers_no_more_connections_than_it_may() -> None:
    meter = Meter(8.0, 1e9, 100)
    for number in range(1000):
        meter.judge(number.to_bytes(4, "big"), 1, 0.0)
    assert len(meter) == 100


def test_what_takes_long_to_deal_with_uses_the_rate_up() -> None:
    meter = Meter(1e6, 1e9, 100)
    for _ in range(100):
        meter.judge(b"a", 1, 0.0)
        meter.spend(b"a", 0.001)  # as any message may
    assert meter.judge(b"a", 1, 0.0) == "fine"
    verdicts = []
    for _ in range(40):
        verdicts.append(meter.judge(b"a", 1, 0.0))
        meter.spend(b"a", 0.1)
    assert verdicts[:10] == ["fine"] * 10
    assert verdicts[-1] == "too much"
    assert meter.judge(b"b", 1, 0.0) == "fine"
    assert meter.judge(b"a", 1, 60.0) == "fine"
