"""The block pool against a naive one: counts in a dict, and lists searched from one end to the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.blocks import BlockPool, chain_digest, root_digest


class NaivePool:
    def __init__(self, blocks: int) -> None:
        self.references = dict.fromkeys(range(blocks), 0)
        self.content: dict[int, bytes] = {}  # of blocks that can be found
        self.released: list[int] = []  # cached blocks, oldest release first

    def free(self) -> set[int]:
        return {block for block, count in self.references.items() if count == 0 and block not in self.content}

    def available(self) -> int:
        return sum(count == 0 for count in self.references.values())

    def find(self, digest: bytes) -> int | None:
        return next((block for block, content in self.content.items() if content == digest), None)

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0 and block in self.content:
                self.released.append(block)

    def hold(self, block: int) -> None:
        self.references[block] += 1
        if block in self.released:
            self.released.remove(block)

    def allocated(self, blocks: list[int]) -> None:
        """The pool gave these: each was free, or else was the least recently released of all when nothing was free."""
        for block in blocks:
            free = self.free()
            assert block in free if free else block == self.released[0]
            assert self.references[block] == 0
            if block in self.content:
                del self.content[block]
                self.released.remove(block)
            self.references[block] = 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 4), st.integers(0, 0)),
        st.tuples(st.just("publish"), st.integers(0, 9), st.integers(0, 7)),
        st.tuples(st.just("hold"), st.integers(0, 7), st.integers(0, 0)),
        st.tuples(st.just("release"), st.integers(0, 9), st.integers(0, 0)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 8), STEPS)
def test_the_pool_does_what_a_naive_pool_does(blocks: int, steps: list[tuple[str, int, int]]) -> None:
    pool, naive = BlockPool(blocks), NaivePool(blocks)
    holders: list[list[int]] = []  # what each stream holds, in token order
    for name, a, b in steps:
        if name == "allocate" and a <= naive.available():
            taken = pool.allocate(a)
            assert len(taken) == len(set(taken)) == a
            naive.allocated(taken)
            holders.append(taken)
        elif name == "allocate":
            with pytest.raises(RuntimeError):
                pool.allocate(a)
        elif name == "publish" and holders and holders[a % len(holders)]:
            block, digest = holders[a % len(holders)][b % len(holders[a % len(holders)])], bytes([b])
            pool.publish(block, digest)
            if naive.find(digest) is None:
                naive.content.setdefault(block, digest)
        elif name == "hold" and (block := pool.lookup(bytes([a]))) is not None:
            assert pool.is_cached(block) == (naive.references[block] == 0)
            pool.hold(block)
            naive.hold(block)
            holders.append([block])
        elif name == "release" and holders:
            gone = holders.pop(a % len(holders))
            pool.release(gone)
            naive.release(gone)
        assert pool.available == naive.available()
        assert [pool.lookup(bytes([digest])) for digest in range(8)] == [naive.find(bytes([digest])) for digest in range(8)]
        pool.check()
    for held in holders:
        pool.release(held)
    assert pool.available == blocks
    pool.check()


def test_the_tail_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.publish(block, bytes([block]))
    pool.release(blocks)
    assert [pool.allocate(1) for _ in range(3)] == [[blocks[2]], [blocks[1]], [blocks[0]]]


def test_a_free_block_is_taken_before_a_cached_one() -> None:
    pool = BlockPool(2)
    (cached,) = pool.allocate(1)
    pool.publish(cached, b"content")
    pool.release([cached])
    assert pool.allocate(1) == [1 - cached]
    assert pool.lookup(b"content") == cached
    assert pool.allocate(1) == [cached]
    assert pool.lookup(b"content") is None


def test_an_allocation_that_fails_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="3 blocks are wanted and 2 are available"):
        pool.allocate(3)
    assert pool.available == 2
    assert len(pool.allocate(2)) == 2


def test_check_sees_a_block_that_was_released_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(RuntimeError):
        pool.check()


def test_check_sees_a_block_that_was_never_released() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool._free.append(0)
    with pytest.raises(RuntimeError, match="lost or double"):
        pool.check()


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([b"", b"a", b"ab"]), st.lists(TOKENS, max_size=3)), min_size=2, max_size=6))
def test_digests_are_equal_exactly_for_equal_salts_and_tokens(chains: list[tuple[bytes, list[list[int]]]]) -> None:
    digests = {}
    for salt, blocks in chains:
        digest = root_digest(salt)
        for block in blocks:
            digest = chain_digest(digest, np.array(block, np.int32).tobytes())
        digests[salt, tuple(tuple(block) for block in blocks)] = digest
    assert len(set(digests.values())) == len(digests)
