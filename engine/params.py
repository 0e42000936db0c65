"""Sampling parameters: one table of fields.

The table below is the only place that names a parameter, its type, its range, its default and its help text. Validation, the wire
format, the command line and PROTOCOL.md are all read from it. It imports nothing but the standard library, so a client can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

MAX_TOKEN_ID = 2**31 - 1
MAX_LIST = 4096
LONGEST_NAME = 256  # characters of a request's id, of a tenant
HIGHEST_PRIORITY = 10  # and the lowest is its negative: the scheduler looks at each level in each step


class InvalidParameter(ValueError):
    """A parameter is of the wrong type or out of range. Carries the field, the value and the limit that it broke."""

    def __init__(self, name: str, value: object, limit: str) -> None:
        shown = repr(value)
        self.field, self.value, self.limit = name, shown if len(shown) <= 120 else shown[:117] + "...", limit
        super().__init__(f"{name}={self.value}: must be {limit}")


Check = Callable[[str, Any], Any]


def _integer(low: int, high: int) -> Check:
    limit = f"an integer from {low} to {high}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidParameter(name, value, limit)
        return value

    return check


def _number(low: float, high: float, *, above: bool = False) -> Check:
    limit = f"a finite number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidParameter(name, value, limit)
        if not low <= value <= high or (above and value == low):
            raise InvalidParameter(name, value, limit)
        return float(value)

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidParameter(name, value, "true or false")
    return value


def _optional(inner: Check) -> Check:
    return lambda name, value: None if value is None else inner(name, value)


def _sequence(inner: Check, most: int, what: str) -> Check:
    limit = f"a list of at most {most} {what}"

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) > most:
            raise InvalidParameter(name, value, limit)
        return tuple(inner(f"{name}[{i}]", item) for i, item in enumerate(value))

    return check


def _text(longest: int) -> Check:
    limit = f"a non-empty string of at most {longest} characters"

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= longest:
            raise InvalidParameter(name, value, limit)
        return value

    return check


_token = _integer(0, MAX_TOKEN_ID)


def _word(name: str, value: Any) -> str | tuple[int, ...]:
    """A word that must not appear: text, or the exact token ids of it."""
    if isinstance(value, str):
        return str(_text(256)(name, value))
    if isinstance(value, list | tuple) and not value:
        raise InvalidParameter(name, value, "a string or a non-empty list of token ids")
    return tuple(_sequence(_token, 64, "token ids")(name, value))


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Accepts a mapping or pairs; kept as sorted pairs so that equal biases are equal values."""
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple) or len(value) > MAX_LIST:
        raise InvalidParameter(name, value, f"a map of at most {MAX_LIST} token ids to biases")
    amount = _number(-100, 100)
    checked = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InvalidParameter(name, pair, "a pair of a token id and a bias")
        checked[_token(name, pair[0])] = amount(f"{name}[{pair[0]}]", pair[1])
    return tuple(sorted(checked.items()))


def _param(default: Any, check: Check, help: str) -> Any:
    return field(default=default, metadata={"check": check, "help": help})


class _Table:
    """A frozen dataclass whose fields check themselves and travel as a map."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for spec in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, spec.name, spec.metadata["check"](spec.name, getattr(self, spec.name)))

    @classmethod
    def from_wire(cls, values: object) -> Self:
        """Build from an untrusted map. Raises `InvalidParameter` for an unknown field or a value that is not allowed."""
        names = {spec.name for spec in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, Mapping):
            raise InvalidParameter(cls.__name__, values, "a map of names to values")
        for name in values:
            if name not in names:
                raise InvalidParameter(str(name), values[name], "one of the known names: " + ", ".join(sorted(names)))
        return cls(**values)

    def to_wire(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that messages stay small and old peers understand new clients."""
        return {spec.name: value for spec in fields(self) if (value := getattr(self, spec.name)) != spec.default}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(_Table):
    """How the tokens of one request are chosen and when it ends. `None` for `temperature`, `top_k`, `top_p`, `min_p` and
    `repetition_penalty` means the model's own `generation_config` value, else neutral."""

    max_tokens: int | None = _param(None, _optional(_integer(1, 2**30)), "most tokens to generate; none: up to the model's limit")
    min_tokens: int = _param(0, _integer(0, 2**30), "no end-of-sequence or stop token before this many tokens")
    temperature: float | None = _param(None, _optional(_number(0, 100)), "0 is greedy")
    top_k: int | None = _param(None, _optional(_integer(0, MAX_TOKEN_ID)), "keep the k most likely tokens; 0 keeps all")
    top_p: float | None = _param(None, _optional(_number(0, 1, above=True)), "keep the smallest set with this probability")
    min_p: float | None = _param(None, _optional(_number(0, 1)), "drop tokens below this share of the likeliest one's probability")
    repetition_penalty: float | None = _param(
        None, _optional(_number(0, 100, above=True)), "above 1 makes tokens of prompt and output less likely"
    )
    presence_penalty: float = _param(0.0, _number(-2, 2), "subtracted once from the logit of each token generated so far")
    frequency_penalty: float = _param(0.0, _number(-2, 2), "subtracted for each time that a token was generated")
    logit_bias: tuple[tuple[int, float], ...] = _param((), _bias, "token id to a number added to its logit")
    allowed_tokens: tuple[int, ...] = _param((), _sequence(_token, MAX_LIST, "token ids"), "never any but these tokens; empty allows all")
    bad_words: tuple[str | tuple[int, ...], ...] = _param(
        (),
        _sequence(_word, 256, "words"),
        "texts, or lists of token ids, that must not be generated, unless they leave none of `allowed_tokens`",
    )
    seed: int | None = _param(None, _optional(_integer(0, 2**63 - 1)), "the same seed gives the same tokens; none: drawn")
    n: int = _param(1, _integer(1, 128), "independent samples of the same prompt")
    ignore_eos: bool = _param(False, _boolean, "go on after an end-of-sequence token")
    stop_token_ids: tuple[int, ...] = _param((), _sequence(_token, 64, "token ids"), "tokens that end the text")
    stop: tuple[str, ...] = _param((), _sequence(_text(512), 32, "strings"), "strings that end the text; they are never returned")
    logprobs: int | None = _param(None, _optional(_integer(0, 20)), "log-probability of each token, and of the k likeliest")
    prompt_logprobs: int | None = _param(None, _optional(_integer(0, 20)), "the same for the prompt's tokens")
    echo: bool = _param(False, _boolean, "return the prompt's text before the generated text")
    skip_special_tokens: bool = _param(True, _boolean, "leave special tokens out of the text")

    def __post_init__(self) -> None:
        _Table.__post_init__(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")


def _template_kwargs(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or len(value) > 64 or not all(isinstance(key, str) for key in value):
        raise InvalidParameter(name, value, "a map of at most 64 names to values")
    return dict(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions(_Table):
    """How a text or a list of chat messages becomes token ids."""

    add_special_tokens: bool = _param(True, _boolean, "add what the tokenizer puts around a plain text, such as its first token")
    add_generation_prompt: bool = _param(True, _boolean, "chat: end the prompt with the opening of the assistant's turn")
    continue_final_message: bool = _param(False, _boolean, "chat: leave the last message open, to be continued")
    template_kwargs: Mapping[str, Any] | None = _param(None, _optional(_template_kwargs), "chat: further variables for the template")
    truncate: int | None = _param(None, _optional(_integer(1, 2**30)), "keep the last so many tokens of the prompt; none: refuse")

    def __post_init__(self) -> None:
        _Table.__post_init__(self)
        if self.continue_final_message and self.add_generation_prompt:
            object.__setattr__(self, "add_generation_prompt", False)
