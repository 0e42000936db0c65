"""The sampler against transformers' own processors, against the softmax it should follow, and against itself in other batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import generation

from penstock.engine.noise import GOLDEN, MIX_1, MIX_2, gumbel, id_steps, noise_keys
from penstock.engine.plan import Fill
from penstock.engine.request import Sampler
from penstock.engine.sampling import Sampled, SlotSampler

VOCAB = 500
CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def to_device(columns: dict[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(c.astype(np.int64) if c.dtype.kind in "ib" else c) for name, c in columns.items()}


def sample(
    logits: Tensor, samplers: list[Sampler], histories: list[tuple[list[int], list[int]]] | None = None, slots: list[int] | None = None
) -> Sampled:
    """Sample a row for each sampler, in slots of its own, after a history of prompt and generated tokens."""
    slots = slots or list(range(len(samplers)))
    histories = histories or [([1], [])] * len(samplers)
    machine = SlotSampler(max(slots) + 1, logits.shape[1], CPU)
    for slot, sampler, (prompt, generated) in zip(slots, samplers, histories, strict=True):
        machine.fill(Fill(slot, len(prompt), sampler, np.array(prompt + generated, np.int32)))
    positions = np.array([len(prompt) + len(generated) for prompt, generated in histories], np.int32)
    return machine.sample(logits.clone(), to_device(machine.prepare(np.array(slots, np.int32), positions)))


def scores_after(logits: Tensor, sampler: Sampler, prompt: list[int], generated: list[int]) -> Tensor:
    """What the sampler makes of one row of logits before it draws."""
    machine = SlotSampler(1, logits.shape[0], CPU)
    machine.fill(Fill(0, len(prompt), sampler, np.array(prompt + generated, np.int32)))
    columns = to_device(machine.prepare(np.zeros(1, np.int32), np.array([len(prompt) + len(generated)], np.int32)))
    kept: list[Tensor] = []
    machine._draw = lambda scores, *_: (kept.append(scores.clone()), scores.argmax(-1))[1]  # type: ignore[method-assign]
    machine.sample(logits[None].clone(), columns)
    return kept[0][0]


def allowed_draws(logits: Tensor, sampler: Sampler, draws: int = 400) -> set[int]:
    """The tokens that come up for many seeds."""
    return set(sample(logits.expand(draws, -1), [replace(sampler, seed=seed) for seed in range(draws)]).ids.tolist())


def hash_in_integers(seed: int, position: int, token: int) -> float:
    """The noise's definition in Python's own integers and floats."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * MIX_1) & MASK
        x = ((x ^ (x >> 27)) * MIX_2) & MASK
        return x ^ (x >> 31)

    key = mix((mix((seed + GOLDEN) & MASK) + (position + 1) * GOLDEN) & MASK)
    bits = mix((key + (token + 1) * GOLDEN) & MASK) >> 12
    return -math.log(-math.log((bits + 0.5) * 2.0**-52))


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**31 - 1), token=st.integers(0, 300_000))
@settings(max_examples=200, deadline=None)
def test_noise_is_the_hash_that_its_page_defines(seed: int, position: int, token: int) -> None:
    keys = noise_keys(np.array([seed]), np.array([position], np.int32))
    got = gumbel(torch.from_numpy(keys), id_steps(token + 1, CPU)[token:])
    assert got.item() == pytest.approx(hash_in_integers(seed, position, token), rel=1e-6, abs=1e-6)


def test_noise_is_gumbel_distributed() -> None:
    keys = noise_keys(np.arange(200), np.zeros(200, np.int32))
    noise = gumbel(torch.from_numpy(keys), id_steps(5000, CPU)).double().flatten()
    assert torch.isfinite(noise).all()
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    distance = (uniform - (torch.arange(len(uniform)) + 0.5) / len(uniform)).abs().max()
    assert distance < 1.95 / math.sqrt(len(uniform))  # Kolmogorov-Smirnov, far beyond p = 0.001


def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(1)
    logits, draws = torch.randn(40) * 2, 40_000
    keys = noise_keys(np.full(draws, 7), np.arange(draws))
    noise = gumbel(torch.from_numpy(keys), id_steps(40, CPU))
    counts = torch.bincount((logits / 0.7 + noise).argmax(-1), minlength=40).double()
    expected = torch.softmax(logits.double() / 0.7, -1) * draws
    common = expected > 5
    chi_square = (((counts - expected) ** 2) / expected)[common].sum().item()
    freedom = int(common.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    seeds, positions = np.meshgrid(np.arange(40), np.arange(40))
    keys = noise_keys(seeds.ravel(), positions.ravel())
    assert len(set(keys.tolist())) == 1600
    noise = gumbel(torch.from_numpy(keys), id_steps(64, CPU)).double()
    correlation = torch.corrcoef(noise[:64])
    assert (correlation - torch.eye(64)).abs().max() < 0.6
    assert abs(torch.corrcoef(torch.stack((noise[:-1].flatten(), noise[1:].flatten())))[0, 1]) < 0.02


def test_greedy_takes_the_likeliest_and_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [30, 77]] = 3.0
    logits[1, 499] = 1.0
    assert sample(logits, [Sampler(), Sampler()]).ids.tolist() == [30, 499]


def test_temperature_divides_before_the_noise() -> None:
    logits = torch.randn(1, VOCAB)
    noise = gumbel(torch.from_numpy(noise_keys(np.array([5]), np.array([1]))), id_steps(VOCAB, CPU))
    expected = (logits / 0.3 + noise).argmax().item()
    assert sample(logits, [Sampler(temperature=0.3, seed=5)]).ids.item() == expected


SAMPLERS = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, VOCAB + 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((3, 5.0), (7, -100.0))]),
    allowed_tokens=st.sampled_from([(), (1, 2, 3, 50, 60)]),
    bad_words=st.sampled_from([(), ((1,), (2, 3), (9, 9, 4))]),
    min_tokens=st.sampled_from([0, 3]),
    stop_ids=st.just((2, 3)),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([-1, 0, 3]),
)
HISTORIES = st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), st.lists(st.integers(0, VOCAB - 1), max_size=6))


@given(rows=st.lists(st.tuples(SAMPLERS, HISTORIES, st.integers(0, 2**31)), min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_token_in_any_batch_and_slot(rows: list[tuple[Sampler, Any, int]], data: st.DataObject) -> None:
    logits = torch.stack([torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3 for _, _, seed in rows])
    samplers, histories = [row[0] for row in rows], [row[1] for row in rows]
    order = data.draw(st.permutations(range(len(rows))))
    slots = data.draw(st.permutations(range(8)))[: len(rows)]
    batched = sample(logits[order], [samplers[i] for i in order], [histories[i] for i in order], list(slots))
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1], [samplers[i]], [histories[i]])
        assert batched.ids[place] == alone.ids[0]
        if samplers[i].logprobs >= 0:
            assert batched.logprobs is not None
            assert alone.logprobs is not None
            row = batched.logprobs.rows.tolist().index(place)
            width = 1 + samplers[i].logprobs
            assert torch.equal(batched.logprobs.values[row, :width], alone.logprobs.values[0, :width])


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, prompt, generated = torch.randn(VOCAB), [4, 9, 9, 200], [7, 4, 7]
    processor = generation.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + generated]), logits[None].clone())[0]
    torch.testing.assert_close(scores_after(logits, Sampler(temperature=1.0, repetition_penalty=penalty), prompt, generated), expected)


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    logits, prompt, generated = torch.randn(VOCAB), [4, 9, 9], [7, 4, 7]
    expected = logits.clone()
    expected[7] -= 0.5 * 2 + 0.25
    expected[4] -= 0.5 + 0.25
    got = scores_after(logits, Sampler(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25), prompt, generated)
    torch.testing.assert_close(got, expected)


def test_penalties_follow_the_tokens_drawn_since() -> None:
    machine = SlotSampler(2, VOCAB, CPU)
    machine.fill(Fill(1, 1, Sampler(presence_penalty=2.0, frequency_penalty=2.0), np.array([3], np.int32)))
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([3.0, 2.5, 2.0])
    drawn = []
    for step in range(4):
        columns = to_device(machine.prepare(np.array([1], np.int32), np.array([1 + step], np.int32)))
        drawn.append(machine.sample(logits.clone(), columns).ids.item())
    assert drawn[:3] == [0, 1, 2]
    assert drawn[3] not in (0, 1, 2)


def test_a_new_occupant_of_a_slot_starts_without_its_forerunners_counts() -> None:
    machine = SlotSampler(1, VOCAB, CPU)
    sampler = Sampler(presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 8] = 1.0
    for _ in range(2):
        machine.fill(Fill(0, 1, sampler, np.array([3], np.int32)))
        assert machine.sample(logits.clone(), to_device(machine.prepare(np.zeros(1, np.int32), np.ones(1, np.int32)))).ids.item() == 8


def test_counts_for_more_slots_are_made_room_for() -> None:
    samplers = [Sampler(presence_penalty=2.0) for _ in range(9)]
    logits = torch.zeros(9, VOCAB)
    logits[:, 5], logits[:, 6] = 2.0, 1.0
    assert sample(logits, samplers, [([1], [5] * (i % 2)) for i in range(9)]).ids.tolist() == [5, 6] * 4 + [5]


@pytest.mark.parametrize("k", [1, 7, 499, 500, 9999])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    logits = torch.randn(VOCAB)
    kept = generation.TopKLogitsWarper(min(k, VOCAB))(torch.zeros(1, 1).long(), logits[None].clone())[0].isfinite()
    assert allowed_draws(logits, Sampler(temperature=1.0, top_k=k)) <= set(kept.nonzero().flatten().tolist())
    assert filtered(logits, Sampler(temperature=1.0, top_k=k)).isfinite().equal(kept)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.7, 4.0])
@pytest.mark.parametrize("k", [0, 40])
def test_top_p_keeps_what_transformers_keeps_after_temperature_and_top_k(p: float, temperature: float, k: int) -> None:
    logits = torch.randn(VOCAB) * 2
    scores = logits[None].clone() / temperature
    if k:
        scores = generation.TopKLogitsWarper(k)(torch.zeros(1, 1).long(), scores)
    kept = generation.TopPLogitsWarper(p)(torch.zeros(1, 1).long(), scores)[0].isfinite()
    assert filtered(logits, Sampler(temperature=temperature, top_p=p, top_k=k)).isfinite().equal(kept)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.9])
def test_min_p_keeps_what_transformers_keeps(p: float) -> None:
    logits = torch.randn(VOCAB) * 2
    kept = generation.MinPLogitsWarper(p)(torch.zeros(1, 1).long(), logits[None].clone())[0].isfinite()
    assert filtered(logits, Sampler(temperature=1.0, min_p=p)).isfinite().equal(kept)


def filtered(logits: Tensor, sampler: Sampler) -> Tensor:
    """One row after temperature, top-k, top-p and min-p."""
    import penstock.engine.sampling as sampling

    machine = SlotSampler(1, VOCAB, CPU)
    machine.fill(Fill(0, 1, sampler, np.array([1], np.int32)))
    kept: list[Tensor] = []
    original = sampling.draw
    sampling.draw = lambda scaled, *_: (kept.append(scaled.clone()), scaled.argmax(-1))[1]
    try:
        machine.sample(logits[None].clone(), to_device(machine.prepare(np.zeros(1, np.int32), np.ones(1, np.int32))))
    finally:
        sampling.draw = original
    return kept[0][0]


def test_bias_is_added_before_temperature() -> None:
    logits = torch.randn(VOCAB)
    expected = logits.clone()
    expected[3] += 5.0
    expected[9] -= 100.0
    torch.testing.assert_close(scores_after(logits, Sampler(temperature=0.5, logit_bias=((3, 5.0), (9, -100.0))), [1], []), expected)


def test_only_allowed_tokens_are_drawn() -> None:
    assert allowed_draws(torch.randn(VOCAB), Sampler(temperature=5.0, allowed_tokens=(3, 400, 77, 3))) == {3, 77, 400}


@pytest.mark.parametrize("generated", [[5], [5, 6], [6], [5, 6, 7], [1, 5, 6, 7, 5, 6]])
def test_bad_words_are_those_of_transformers(generated: list[int]) -> None:
    logits, words, prompt = torch.randn(VOCAB), ((8,), (5, 6, 7), (6, 9), (7, 5, 6, 2), (5, 6, 30)), [9, 7]
    processor = generation.NoBadWordsLogitsProcessor([list(word) for word in words])
    expected = processor(torch.tensor([prompt + generated]), logits[None].clone())[0]
    torch.testing.assert_close(scores_after(logits, Sampler(temperature=1.0, bad_words=words), prompt, generated), expected)


def test_bad_words_are_seen_across_tokens_that_the_host_does_not_know_yet() -> None:
    machine = SlotSampler(1, VOCAB, CPU)
    machine.fill(Fill(0, 1, Sampler(bad_words=((5, 5, 5),)), np.array([1], np.int32)))
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.0
    drawn = []
    for step in range(7):
        columns = to_device(machine.prepare(np.zeros(1, np.int32), np.array([1 + step], np.int32)))
        drawn.append(machine.sample(logits.clone(), columns).ids.item())
    assert drawn == [5, 5, 6, 5, 5, 6, 5]


def test_stop_ids_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 4] = 2.0, 1.0
    sampler = Sampler(min_tokens=3, stop_ids=(2,))
    drawn = [sample(logits, [sampler], [([1, 1], [9] * generated)]).ids.item() for generated in range(5)]
    assert drawn == [4, 4, 4, 2, 2]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(2, VOCAB)
    sampler = Sampler(temperature=3.0, top_k=2, logit_bias=((9, 50.0),), logprobs=4)
    out = sample(logits, [Sampler(), sampler])
    raw = torch.log_softmax(logits[1].double(), -1)
    assert out.logprobs is not None
    assert out.logprobs.rows.tolist() == [1]
    assert out.ids[1] == 9
    assert out.logprobs.ids[0, 0] == 9
    assert out.logprobs.ids[0, 1:].tolist() == raw.topk(4).indices.tolist()
    torch.testing.assert_close(out.logprobs.values[0].double(), raw[out.logprobs.ids[0]], atol=1e-5, rtol=1e-5)
    assert out.logprobs.ranks[0] == 1 + int((raw > raw[9]).sum())


def test_a_neutral_row_is_not_changed_by_what_its_neighbours_ask_for() -> None:
    logits = torch.randn(2, VOCAB, dtype=torch.float32)
    busy = Sampler(
        temperature=1.0, top_k=3, top_p=0.5, repetition_penalty=2.0, presence_penalty=1.0, allowed_tokens=(1, 2), bad_words=((1, 2),)
    )
    for plain in (Sampler(), Sampler(temperature=0.9, seed=3)):
        assert sample(logits, [plain, busy]).ids[0] == sample(logits[:1], [plain]).ids[0]


def test_bfloat16_logits_draw_as_their_float32_values_do() -> None:
    logits = torch.randn(6, VOCAB).bfloat16()
    samplers = [Sampler(temperature=0.0 if i % 2 else 0.8, seed=i, top_k=i, repetition_penalty=1.0 + i / 10) for i in range(6)]
    assert torch.equal(sample(logits, samplers).ids, sample(logits.float(), samplers).ids)


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(allowed_tokens=(4,), bad_words=((4,),)),
        Sampler(allowed_tokens=(4, 9), bad_words=((4,), (1, 7, 9))),
        Sampler(allowed_tokens=(4, 9), bad_words=((4,), (9,)), stop_ids=(4,), min_tokens=9),
        Sampler(allowed_tokens=(4, 9), stop_ids=(4, 9), min_tokens=9),
        Sampler(allowed_tokens=(4,), bad_words=((4,),), top_k=3, top_p=0.9, min_p=0.1, presence_penalty=2.0),
    ],
)
def test_bans_that_leave_nothing_of_what_is_allowed_give_way(sampler: Sampler, temperature: float) -> None:
    logits = torch.randn(3, VOCAB)
    history = [([3, 1], [7])]
    # Beside a row that is banned from less, and one that asks for nothing: each gets what it gets alone.
    others = [Sampler(allowed_tokens=(4, 9), bad_words=((9,),)), Sampler()]
    samplers = [replace(other, temperature=temperature) for other in (sampler, *others)]
    got = sample(logits, samplers, history * 3).ids.tolist()
    assert got[0] in sampler.allowed_tokens
    assert got[1] == 4
    assert got == [sample(logits[row : row + 1], [samplers[row]], history).ids.item() for row in range(3)]


def test_the_likeliest_allowed_token_is_taken_where_bans_give_way() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 77] = 1.0, 5.0
    assert sample(logits, [Sampler(allowed_tokens=(4, 9), bad_words=((4,), (9,)))]).ids.item() == 9


def test_a_ban_that_leaves_something_of_what_is_allowed_holds() -> None:
    assert allowed_draws(torch.randn(VOCAB), Sampler(temperature=5.0, allowed_tokens=(3, 400, 77), bad_words=((77,), (1, 3)))) == {400}


def test_what_is_not_allowed_is_not_drawn_either_in_a_word_of_allowed_tokens() -> None:
    machine = SlotSampler(1, VOCAB, CPU)
    machine.fill(Fill(0, 1, Sampler(allowed_tokens=(300,), bad_words=((300, 300),)), np.array([1], np.int32)))
    drawn = []
    for step in range(5):
        columns = to_device(machine.prepare(np.zeros(1, np.int32), np.array([1 + step], np.int32)))
        drawn.append(machine.sample(torch.randn(1, VOCAB), columns).ids.item())
    assert drawn == [300] * 5


@pytest.mark.parametrize("bad_words", [(), ((4,),), ((8,),)])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
def test_allowed_tokens_that_the_model_excludes_are_still_all_that_is_drawn(bad_words: Any, temperature: float) -> None:
    logits = torch.randn(1, VOCAB)
    logits[0, [4, 9]] = -math.inf
    assert sample(logits, [Sampler(temperature=temperature, allowed_tokens=(4, 9), bad_words=bad_words)]).ids.item() in (4, 9)
