"""Which pages of adapters stay in host memory, and that what is there is what was read."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from penstock.engine.lora import host as host_of
from penstock.engine.lora.host import HostPages

ELEMENTS = 10


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_of, "PIECE", 16)  # four elements: a page has three pieces


def make(pages: int) -> HostPages:
    return HostPages(ELEMENTS, torch.float32, pages * 3 * 16, pinned=False)


def ask(host: HostPages, name: int) -> bool:
    """Whether it was there. If not it is read."""
    key = str(name), 0
    page = host.find(key)
    if page is None:
        filled = host.take()
        assert [len(piece) for piece in filled.pieces] == [4, 4, 4]
        for piece in filled.pieces:
            piece.fill_(name)
        host.give(key, filled)
        return False
    assert all(bool((piece == name).all()) for piece in page.pieces), "the page holds another one's"
    return True


def test_a_page_is_kept_that_is_asked_for_again() -> None:
    host = make(2)
    assert [ask(host, 1) for _ in range(4)] == [False, False, True, True]
    assert (len(host), host.hits, host.misses) == (1, 2, 2)
    assert not any(ask(host, name) for name in range(2, 40)), "each of them only once"
    assert ask(host, 1)
    assert len(host) == 1


def test_those_that_take_turns_do_not_drive_each_other_out() -> None:
    host = make(5)
    for _ in range(3):
        for name in range(10):
            ask(host, name)
    before = host.hits
    for _ in range(20):
        for name in range(10):
            ask(host, name)
    assert len(host) == 5
    assert host.hits - before == 5 * 20


def test_who_was_asked_for_often_goes_when_that_was_long_ago() -> None:
    host = make(2)
    for _ in range(30):
        ask(host, 1)
        ask(host, 2)
    for _ in range(40):
        ask(host, 3)
        ask(host, 4)
    assert ask(host, 3)
    assert ask(host, 4)


def test_without_memory_for_one_more_the_longest_unused_gives_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    host = make(3)
    for name in (1, 2, 3) * 2 + (2, 1):
        ask(host, name)
    host._free.clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory can be locked")

    monkeypatch.setattr(torch, "empty", refuse)
    assert [ask(host, name) for name in (4, 2, 1, 3)] == [False, True, True, False]


def test_it_never_holds_more_than_fits_and_one_page_more() -> None:
    host, draw = make(3), random.Random(0)
    for _ in range(2000):
        ask(host, min(draw.randrange(12), draw.randrange(12)))
        assert len(host) <= 3
        assert len(host._kept) + len(host._free) <= 4
        assert len(host._uses) <= 12
    assert host.hits > host.misses / 2


def test_without_room_everything_goes_through_one_page() -> None:
    host = make(0)
    assert not any(ask(host, name % 2) for name in range(10))
    assert len(host._free) == 1
