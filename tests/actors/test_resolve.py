"""From what is asked to what is run: defaults, limits, and values that come back from outside."""

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.actors.config import EngineConfig
from penstock.actors.errors import CODES, Fault, Refusal
from penstock.actors.resolve import Model, Resolved, child_seed, resolve, resolved_from_wire
from penstock.engine.params import InvalidParameter, PromptOptions, SamplingParams

MODEL = Model(
    name="m", digest="d", tokenizer="t", vocab_size=100, max_model_len=50, capacity=64, eos=(2, 3),
    defaults={"temperature": 0.7, "top_p": 0.9},
)  # fmt: skip


def ids(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def resolved(params: SamplingParams, prompt: bytes = ids(1, 2, 3), **more: Any) -> Resolved:
    return resolve(params, prompt, (), MODEL, adapter=None, priority=0, tenant="", seed=5, **more)


def test_open_parameters_take_the_models_defaults_and_else_neutral_ones() -> None:
    params = resolved(SamplingParams()).params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (0.7, 0.9, 0, 0.0, 1.0)
    assert resolved(SamplingParams(temperature=0.0)).params.temperature == 0.0


def test_an_unseeded_request_gets_the_seed_that_was_drawn_and_a_seeded_one_keeps_its_own() -> None:
    assert resolved(SamplingParams()).params.seed == 5
    assert resolved(SamplingParams(seed=0)).params.seed == 0


def test_the_length_is_limited_by_the_context_and_by_the_cache() -> None:
    assert resolved(SamplingParams()).limit == 47
    assert resolved(SamplingParams(max_tokens=9)).limit == 9
    small = Model(name="m", digest="d", tokenizer="t", vocab_size=100, max_model_len=50, capacity=16, eos=(), defaults={})
    assert resolve(SamplingParams(), ids(*range(10)), (), small, adapter=None, priority=0, tenant="", seed=1).limit == 7


@pytest.mark.parametrize(
    ("tokens", "code"), [([], "invalid_request"), ([100], "invalid_request"), ([-1], "invalid_request"), ([1] * 50, "prompt_too_long")]
)
def test_a_prompt_that_cannot_run_is_refused(tokens: list[int], code: str) -> None:
    with pytest.raises(Refusal) as caught:
        resolved(SamplingParams(), ids(*tokens))
    assert caught.value.fault.code == code


def test_truncation_keeps_the_end_of_the_prompt() -> None:
    assert resolved(SamplingParams(), ids(*range(60)), truncate=4).prompt == ids(56, 57, 58, 59)


def test_end_of_sequence_stops_unless_it_is_ignored() -> None:
    stops = [resolved(SamplingParams(ignore_eos=ignore, stop_token_ids=[9, 2])).sampler(0, MODEL.eos).stop_ids for ignore in (False, True)]
    assert stops == [(2, 3, 9), (9, 2)]


def test_samples_of_one_request_have_seeds_of_their_own_and_the_first_has_the_requests() -> None:
    seeds = [resolved(SamplingParams(seed=11)).sampler(child, ()).seed for child in range(100)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 100


@given(st.integers(0, 2**63 - 1), st.integers(0, 127))
def test_a_childs_seed_is_a_valid_seed(seed: int, child: int) -> None:
    assert SamplingParams(seed=child_seed(seed, child)).seed == child_seed(seed, child)


def test_a_resolved_value_survives_the_wire() -> None:
    value = resolved(SamplingParams(stop=["x"], logit_bias={4: 1.5}, n=2))
    assert resolved_from_wire(value.to_wire(), MODEL) == value


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "other"}, "digest_mismatch"),
        ({"tokenizer": None}, "digest_mismatch"),
        ({"prompt": "text"}, "invalid_request"),
        ({"prompt": b"\x00"}, "invalid_request"),
        ({"prompt": ids(1000)}, "invalid_request"),
        ({"prompt": ids(*([1] * 60))}, "prompt_too_long"),
        ({"params": {}}, "invalid_request"),
        ({"params": {"temperature": "x"}}, "invalid_request"),
        ({"params": None}, "invalid_request"),
        ({"words": 3}, "invalid_request"),
        ({"words": ((10**12,),)}, "invalid_request"),
        ({"words": ((500,),)}, "invalid_request"),
        ({"words": (5,)}, "invalid_request"),
        ({"words": ((),)}, "invalid_request"),
        ({"priority": "high"}, "invalid_request"),
        ({"tenant": 4}, "invalid_request"),
        ({"adapter": "a"}, "invalid_request"),
    ],
)
def test_a_value_that_was_tampered_with_is_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(Refusal) as caught:
        resolved_from_wire({**resolved(SamplingParams()).to_wire(), **change}, MODEL)
    assert caught.value.fault.code == code


def test_a_resumed_request_generates_no_more_than_fits_here() -> None:
    small = Model(name="m", digest="d", tokenizer="t", vocab_size=100, max_model_len=20, capacity=64, eos=(), defaults={})
    back = resolved_from_wire(resolved(SamplingParams(min_tokens=30)).to_wire(), small)
    assert (back.limit, back.params.min_tokens) == (17, 17)


def test_a_temperature_that_would_overflow_is_greedy() -> None:
    assert resolved(SamplingParams(temperature=1e-40)).sampler(0, ()).temperature == 0.0


def test_what_is_no_map_is_no_value() -> None:
    with pytest.raises(Refusal):
        resolved_from_wire([1], MODEL)


def test_parameters_travel_as_what_differs_from_the_defaults() -> None:
    params = SamplingParams(temperature=0.5, stop=["a", "b"], logit_bias=[(3, 1)], bad_words=["x", [1, 2]])
    assert set(params.to_wire()) == {"temperature", "stop", "logit_bias", "bad_words"}
    assert SamplingParams.from_wire(params.to_wire()) == params
    assert SamplingParams().to_wire() == {}


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 5, "min_tokens": 6}, {"top_p": 0.0}, {"seed": -1}, {"n": 0}, {"logprobs": 21}, {"stop": "abc"},
        {"presence_penalty": 3},
        {"logit_bias": {1: float("inf")}}, {"logit_bias": [1]}, {"logit_bias": 5}, {"bad_words": [[]]}, {"bad_words": [5]}, {"echo": 1},
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_named_with_its_limit(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams.from_wire(values)
    assert caught.value.field.split("[")[0] in values
    assert caught.value.limit


def test_continuing_the_last_message_opens_no_new_turn() -> None:
    assert not PromptOptions(continue_final_message=True).add_generation_prompt


@pytest.mark.parametrize("values", [{"lookahead": 3}, {"block_size": 7}, {"memory": -1.0}, {"address": "tcp://10.0.0.1:1"}, {"colour": 1}])
def test_a_setting_that_cannot_be_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        EngineConfig.from_wire(values)
    assert caught.value.fault.field in values


def test_a_port_must_be_named() -> None:
    with pytest.raises(Refusal):
        EngineConfig(address="tcp://127.0.0.1:*")


def test_a_config_survives_the_wire() -> None:
    config = EngineConfig(model="x", lookahead=2, memory=1e9)
    assert EngineConfig.from_wire(config.to_wire()) == config


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_fault_says_whether_to_try_again(code: str) -> None:
    wire = Fault(code=code, message="m", retry_after=2.0).to_wire()
    assert wire["retryable"] is CODES[code][0]
    assert Fault.from_wire({**wire, "from_the_future": 1}).message == "m"
