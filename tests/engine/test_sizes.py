"""The sizes that graphs are captured for: there is one for any step, and none is much larger than it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.sizes import Mix, beginnings, close, coarse, likely, samples_of


@given(st.integers(1, 10_000))
def test_any_number_of_tokens_has_a_size_that_is_hardly_larger(most: int) -> None:
    for sizes, more in ((close(most), 1.25), (coarse(max(16, most)), 1.5)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] >= most
        for size, after in pairwise(sizes):
            assert after <= max(size + 1, size * more)
    late = [size for size in coarse(max(16, most)) if size >= 2048]
    assert all(after <= size * 17 / 16 for size, after in pairwise(late))


@pytest.mark.parametrize(("samples", "tokens", "found"), [(0, 8, 8), (1, 512, 16), (16, 512, 16), (17, 512, 64), (17, 40, 40)])
def test_a_mixed_step_samples_few_or_as_many_as_it_can(samples: int, tokens: int, found: int) -> None:
    assert samples_of(samples, tokens, slots=64) == found


def test_likely_sizes_are_each_there_once_with_the_largest_first() -> None:
    rows, tokens, mix = close(64), coarse(8192), Mix(16, 1)
    sizes = list(likely(rows, tokens, (None, mix), 4096))
    assert len(set(sizes)) == len(sizes)
    assert [size.mix for size in sizes] == sorted((size.mix for size in sizes), key=lambda one: one is not None)
    assert sizes[0].tokens == 8192
    assert sizes[0].samples == 64
    for one in (None, mix):
        mine = [size for size in sizes if size.mix == one]
        assert mine[0].tokens == 8192
        decodes = [size.tokens for size in mine if not size.chunks]
        assert decodes == sorted(decodes, reverse=True)
        assert {size.tokens for size in mine if not size.chunks} == set(rows)
        for samples in (16, 64):
            assert {size.tokens for size in mine if size.chunks and not size.prompt and size.samples == samples} >= {
                count for count in tokens if count >= 64
            }
        assert {size.tokens for size in mine if size.prompt} == {count for count in tokens if count >= 4096}
    assert not any(size.prompt for size in likely(rows, tokens, (None,), None))


def test_the_beginnings_of_a_mix_are_few_and_among_its_likely_sizes() -> None:
    rows, tokens, mix = close(64), coarse(512), Mix(64, 4)
    first = list(beginnings(rows, tokens, mix))
    assert set(first) <= set(likely(rows, tokens, (mix,), None))
    assert {(size.chunks, size.tokens) for size in first} == {(True, 512), (False, 64), (False, 32), (False, 16), (False, 8)}
