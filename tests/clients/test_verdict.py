"""What the chaos bench says of a disturbed stream; a bench that cannot see a loss would report none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from penstock.clients import Client
from penstock.clients.bench.load import Watch
from penstock.clients.bench.verdict import DIVERGED, LOST, REPEATED, SAME, TIED, Told, judge, noisy_score

IDS = [7, 3, 9, 4, 1, 8, 2, 6, 5, 0, 11, 12]
WHOLE = Told(IDS, "text", "length", [])


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (WHOLE, SAME),
        (replace(WHOLE, ids=IDS[:5] + IDS[6:]), LOST),
        (replace(WHOLE, ids=IDS[:8]), LOST),
        (replace(WHOLE, error="engine_fault"), LOST),
        (replace(WHOLE, ids=IDS[:5] + IDS[3:]), REPEATED),
        (replace(WHOLE, ids=IDS + IDS[-1:]), REPEATED),
        (replace(WHOLE, ids=[*IDS[:5], 90, 91, 92, 93]), DIVERGED),
        (replace(WHOLE, text="txt"), DIVERGED),
        (replace(WHOLE, reason="cancelled"), DIVERGED),
    ],
)
def test_a_stream_is_the_same_or_it_lost_repeated_or_changed_something(told: Told, verdict: str) -> None:
    assert judge(told, WHOLE, None) == verdict


LONG = Told([number * 37 % 101 for number in range(60)], "text", "length", [])


@pytest.mark.parametrize(
    ("ids", "verdict"),
    [
        (LONG.ids[:20] + [200 + number for number in range(40)], DIVERGED),
        (LONG.ids[:20] + LONG.ids[40:45] + [200 + number for number in range(35)], DIVERGED),  # a phrase that comes again
        (LONG.ids[:20] + LONG.ids[21:] + [99], LOST),
        (LONG.ids[:20] + LONG.ids[19:-1], REPEATED),
        (LONG.ids[:20], LOST),
        (LONG.ids + [5], REPEATED),
    ],
)
def test_where_a_stream_may_part_it_lost_something_only_if_all_that_follows_is_moved(ids: list[int], verdict: str) -> None:
    assert judge(replace(LONG, ids=ids), LONG, None, exact=False) == verdict


@pytest.mark.parametrize(("difference", "verdict"), [(5e-5, TIED), (5e-4, DIVERGED)])
def test_streams_tie_where_the_scores_that_they_part_at_are_equal_in_float32(difference: float, verdict: str) -> None:
    undisturbed = replace(WHOLE, logprobs=[-1.0] * len(IDS))
    logprobs = [-1.0] * 5 + [-1.0 - difference] + [-3.0] * 6
    told = replace(WHOLE, ids=IDS[:5] + [50] * 7, logprobs=logprobs)
    assert judge(told, undisturbed, noisy_score(4, 0.0, 1, 100)) == verdict


def test_the_score_is_what_the_sampler_takes_the_largest_of(tiny_address: str) -> None:
    with Client(tiny_address) as client:
        vocab = client.model["vocab_size"]
        plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
        whole = client.generate([5, 6, 7], max_tokens=24, temperature=1.3, seed=11, logprobs=20, **plain)
    score = noisy_score(3, 1.3, 11, vocab)
    for index, row in enumerate(whole.logprobs or ()):
        chosen = score(index, row.id, row.logprob)
        assert chosen >= max(score(index, token, logprob) for token, logprob in row.top) - 1e-4
    assert any(row.rank > 1 for row in whole.logprobs or ())


def test_a_recovery_ends_with_the_first_token_after_the_silence() -> None:
    watch = Watch(10.0, 10.0)
    for now in (10.01, 10.02, 10.7, 10.71, 11.5):
        watch.arrived(now)
    assert watch.seconds is not None
    assert math.isclose(watch.seconds, 0.7)
    untouched = Watch(10.0, 10.0)
    for now in (10.01, 10.05, 10.09, 10.13, 10.17, 10.21, 10.25, 10.29, 12.0):
        untouched.arrived(now)
    assert untouched.seconds is not None
    assert math.isclose(untouched.seconds, 0.01, abs_tol=1e-6)
    assert Watch(10.0, 10.0).seconds is None
