"""Limits are for all together, and a flood cannot spend what is kept for those who come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.actors.protocol import Accepted, Cancel, Failed
from penstock.actors.tally import Tally, fits
from penstock.clients.launcher import Engine


@given(st.integers(4, 1000), st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 50)), max_size=400))
def test_whoever_has_nothing_gets_something_and_all_together_stay_bounded(limit: int, asked: list[tuple[str, int]]) -> None:
    tally, held = Tally(), 0
    for tenant, more in asked:
        if fits(held, tally.of(tenant)[0], more, limit, len(tally) + 1):
            tally.add(tenant, more, 0)
            held += more
        assert held <= limit + limit // 4
    newcomers = limit // 4 // (len(tally) + 1)
    if held <= limit:
        assert fits(held, 0, min(newcomers, 1), limit, len(tally) + 1)


def test_a_flood_that_has_everything_gets_no_more_and_another_tenant_does() -> None:
    assert not fits(1000, 1000, 1, 1000, 2)
    assert not fits(1000, 500, 1, 1000, 3)
    assert fits(1000, 0, 125, 1000, 2)
    assert not fits(1000, 0, 126, 1000, 2)
    assert not fits(1250, 0, 1, 1000, 2)


def test_what_is_taken_back_leaves_nothing() -> None:
    tally = Tally()
    tally.add("a", 2, 10)
    tally.add("b", 1, 0)
    tally.remove("a", 2, 10)
    assert (len(tally), tally.of("a"), tally.of("b")) == (1, (0, 0), (1, 0))


@pytest.fixture(scope="module")
def small() -> Iterator[Engine]:
    with Engine("tiny", executor="mock", max_open=32, max_queued_tokens=1000) as running:
        running.wait(60)
        yield running


@pytest.mark.parametrize(("prompt", "streams"), [(1, 32), (100, 10)], ids=["streams", "prompt tokens"])
def test_a_flood_over_several_connections_locks_no_other_tenant_out(
    small: Engine, connect: Callable[..., Any], prompt: int, streams: int
) -> None:
    flood = [connect(small.address) for _ in range(2)]
    for raw in flood:
        raw.hello()
        for number in range(streams):
            raw.generate(f"r{number}", ids=b"\1\0\0\0" * prompt, params={"max_tokens": 20_000}, tenant="flood")
    codes = [_answer(raw, f"r{number}") for raw in flood for number in range(streams)]
    assert codes.count("accepted") == streams
    assert codes.count("overloaded") == streams
    other = connect(small.address)
    other.hello()
    other.generate("r", ids=b"\1\0\0\0" * prompt, params={"max_tokens": 3}, tenant="quiet")
    assert other.done("r")["generated_tokens"] == 3
    for raw in flood:
        raw.send(Cancel(tuple(f"r{number}" for number in range(streams))))
    other.until(lambda report: not report["requests"]["open"])


def _answer(raw: Any, request: str) -> str:
    for message in raw.got:
        if isinstance(message, Accepted | Failed) and message.request == request:
            return "accepted" if isinstance(message, Accepted) else str(message.error["code"])
    message = raw.wait(object, lambda message: isinstance(message, Accepted | Failed) and message.request == request)
    return "accepted" if isinstance(message, Accepted) else str(message.error["code"])
