"""From what a client asked to what will be run: every default filled in, every id checked, nothing left to chance.

The resolved value goes back to the client in `Accepted`. With it and the ids released so far, any engine of the same digests can
carry on, whatever happened to this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from penstock.actors.columns import int32
from penstock.actors.errors import Refusal
from penstock.engine.lora.recipe import Wish
from penstock.engine.params import HIGHEST_PRIORITY, LONGEST_NAME, InvalidParameter, SamplingParams
from penstock.engine.request import BadWords, Sampler

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
MOST_WORDS, LONGEST_WORD = 4096, 1024  # of resolved bad words: variants, token ids
COLDEST = 1e-5  # a temperature below this is greedy: logits divided by it would overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What admission needs to know of the model that runs. Sizes in tokens."""

    name: str
    digest: str
    tokenizer: str  # digest
    vocab_size: int
    max_model_len: int
    capacity: int  # tokens that all KV blocks hold together
    eos: tuple[int, ...]
    defaults: Mapping[str, Any]  # of generation_config
    dtype: str = "none"
    kv_dtype: str = "none"
    deterministic: bool = True
    adapter_pages: int = 0  # on the device; 0: it serves no adapters

    @classmethod
    def from_facts(cls, executor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Self:
        return cls(
            name=executor["name"],
            digest=executor["digest"],
            tokenizer=tokenizer["digest"],
            vocab_size=executor["vocab_size"],
            max_model_len=executor["max_model_len"],
            capacity=executor["blocks"] * executor["block_size"],
            eos=tuple(executor["eos"]),
            defaults=executor["defaults"],
            dtype=executor["dtype"],
            kv_dtype=executor["kv_dtype"],
            deterministic=executor["deterministic"],
            adapter_pages=executor["adapters"]["pages"] if executor["adapters"] else 0,
        )


@dataclass(frozen=True, slots=True)
class Adapted:
    """The adapter of a request: what was asked for, and `digest`, that of its content, hexadecimal."""

    wish: Wish
    digest: str

    def to_wire(self) -> dict[str, Any]:
        return {"wish": self.wish.to_wire(), "digest": self.digest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The value of a request, but for the tokens generated so far. `prompt` is int32; `params` has no open default."""

    model: str
    tokenizer: str
    adapter: Adapted | None
    prompt: bytes
    params: SamplingParams
    words: BadWords
    priority: int
    tenant: str

    def to_wire(self) -> dict[str, Any]:
        return {
            "model": self.model, "tokenizer": self.tokenizer, "adapter": self.adapter and self.adapter.to_wire(), "prompt": self.prompt,
            "params": self.params.to_wire(), "words": self.words, "priority": self.priority, "tenant": self.tenant,
        }  # fmt: skip

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def limit(self) -> int:
        if self.params.max_tokens is None:
            raise ValueError("not resolved")
        return self.params.max_tokens

    def sampler(self, child: int, eos: tuple[int, ...]) -> Sampler:
        """For the `child`th of `n` samples: the same, with a seed of its own."""
        params = self.params
        stops = params.stop_token_ids if params.ignore_eos else (*eos, *params.stop_token_ids)
        return Sampler(
            temperature=params.temperature if params.temperature and params.temperature >= COLDEST else 0.0,
            top_k=params.top_k or 0,
            top_p=1.0 if params.top_p is None else params.top_p,
            min_p=params.min_p or 0.0,
            repetition_penalty=params.repetition_penalty or 1.0,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            allowed_tokens=params.allowed_tokens,
            bad_words=self.words,
            seed=child_seed(params.seed or 0, child),
            min_tokens=params.min_tokens,
            stop_ids=tuple(dict.fromkeys(stops)),
            logprobs=-1 if params.logprobs is None else params.logprobs,
            prompt_logprobs=-1 if params.prompt_logprobs is None or child else params.prompt_logprobs,  # all samples have one prompt
        )


def resolve(
    params: SamplingParams,
    prompt: bytes,
    words: BadWords,
    model: Model,
    *,
    adapter: Adapted | None,
    priority: int,
    tenant: str,
    seed: int,
    truncate: int | None = None,
) -> Resolved:
    """Fill in every default and check every id. `seed` is used if the request names none. Raises `Refusal`."""
    ids = int32(prompt)
    if truncate is not None:
        ids = ids[-truncate:]
    check_prompt(ids, model)
    defaults = {name: model.defaults.get(name, neutral) for name, neutral in NEUTRAL.items() if getattr(params, name) is None}
    most = min(room(len(ids), model), params.max_tokens or model.max_model_len)
    filled = replace(
        params, **defaults, seed=seed if params.seed is None else params.seed, max_tokens=most, min_tokens=min(params.min_tokens, most)
    )
    return check(
        Resolved(
            model=model.digest, tokenizer=model.tokenizer, adapter=adapter, prompt=ids.tobytes(), params=filled, words=words,
            priority=priority, tenant=tenant,
        ),
        model,
    )  # fmt: skip


def resolved_from_wire(values: object, model: Model) -> Resolved:
    """A resolved value that a client brings back, believed no more than any other input. Raises `Refusal`."""
    if not isinstance(values, Mapping):
        raise Refusal("invalid_request", "resume must be a map", field="resume", limit="what Accepted returned")
    for name, mine in (("model", model.digest), ("tokenizer", model.tokenizer)):
        if values.get(name) != mine:
            theirs = str(values.get(name))[:120]
            text = f"the request was begun on another {name}: its digest is {theirs}, here it is {mine}"
            raise Refusal("digest_mismatch", text, field=f"resume.{name}", value=theirs, limit=mine)
    prompt, words = values.get("prompt"), values.get("words")
    if not isinstance(prompt, bytes) or len(prompt) % 4:
        raise Refusal("invalid_request", "resume is not what Accepted returned", field="resume", limit="what Accepted returned")
    tenant, priority = check_standing(values.get("tenant"), values.get("priority"))
    try:
        params = SamplingParams.from_wire(values.get("params"))
        checked = _words(words)
    except (InvalidParameter, TypeError) as error:
        raise Refusal("invalid_request", f"resume: {error}", field="resume.params", limit="what Accepted returned") from error
    if params.max_tokens is None or params.seed is None or any(getattr(params, name) is None for name in NEUTRAL):
        raise Refusal("invalid_request", "resume has open defaults", field="resume.params", limit="what Accepted returned")
    check_prompt(int32(prompt), model)
    most = min(params.max_tokens, room(len(prompt) // 4, model))
    params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
    resolved = Resolved(
        model=model.digest, tokenizer=model.tokenizer, adapter=adapted_from_wire(values.get("adapter")), prompt=prompt, params=params,
        words=checked, priority=priority, tenant=tenant,
    )  # fmt: skip
    return check(resolved, model)


def adapted_from_wire(values: object) -> Adapted | None:
    """Raises `Refusal`."""
    if values is None:
        return None
    digest = values.get("digest") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or not isinstance(digest, str):
        raise Refusal("invalid_request", "resume.adapter is not what Accepted returned", field="resume.adapter")
    return Adapted(read_wish(values.get("wish")), digest)


def read_wish(value: object) -> Wish:
    """Raises `Refusal`."""
    try:
        return Wish.from_wire(value)
    except InvalidParameter as error:
        raise Refusal("invalid_request", str(error), field=error.field, value=error.value, limit=error.limit) from error


def room(prompt_tokens: int, model: Model) -> int:
    """The most tokens that can follow a prompt. The last one is never fed back, so it needs no place in the cache."""
    return min(model.max_model_len, model.capacity + 1) - prompt_tokens


def check_standing(tenant: object, priority: object) -> tuple[str, int]:
    """A tenant and a priority that can be. Raises `Refusal`."""
    if not isinstance(tenant, str) or len(tenant) > LONGEST_NAME:
        limit = f"a text of at most {LONGEST_NAME} characters"
        raise Refusal("invalid_request", f"tenant: must be {limit}", field="tenant", value=str(tenant)[:120], limit=limit)
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > HIGHEST_PRIORITY:
        limit, value = f"an integer from {-HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}", str(priority)[:120]
        raise Refusal("invalid_request", f"priority={value}: must be {limit}", field="priority", value=value, limit=limit)
    return tenant, priority


def own_tenant(tenant: str, user: str) -> str:
    """Whom a request of `user` is counted for: where keys say who it is, itself and nobody else. Raises `Refusal`."""
    if user and tenant not in ("", user):
        text = f"tenant={tenant[:120]!r}: requests with this key are counted for {user!r}"
        raise Refusal("invalid_request", text, field="tenant", value=tenant[:120], limit=user)
    return user or tenant


def _words(words: object) -> BadWords:
    """Resolved bad words: there are more of them than a request may give, since a text has several variants."""
    limit = f"a list of at most {MOST_WORDS} words of 1 to {LONGEST_WORD} token ids"
    if not isinstance(words, list | tuple) or len(words) > MOST_WORDS:
        raise InvalidParameter("words", type(words).__name__, limit)
    for word in words:
        listed = isinstance(word, list | tuple) and 0 < len(word) <= LONGEST_WORD
        if not listed or not all(type(token) is int and token >= 0 for token in word):
            raise InvalidParameter("words", word, limit)
    return tuple(tuple(word) for word in words)


def check_prompt(ids: np.ndarray[Any, np.dtype[np.int32]], model: Model) -> None:
    """Raise `Refusal` for a prompt that is empty, has unknown ids, or can never run."""
    if not len(ids):
        raise Refusal("invalid_request", "the prompt is empty", field="prompt", value="", limit="at least 1 token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.vocab_size:
        raise Refusal(
            "invalid_request", f"the prompt has the id {low if low < 0 else high}: the vocabulary has ids 0 to {model.vocab_size - 1}",
            field="ids", value=str(low if low < 0 else high), limit=f"0 to {model.vocab_size - 1}",
        )  # fmt: skip
    most = min(model.max_model_len - 1, model.capacity)
    if len(ids) > most:
        what = "the model's context" if most == model.max_model_len - 1 else "the KV cache"
        raise Refusal(
            "prompt_too_long", f"the prompt has {len(ids)} tokens: {what} has room for {most}", field="prompt", value=str(len(ids)),
            limit=f"{most} tokens",
        )  # fmt: skip


def check(resolved: Resolved, model: Model) -> Resolved:
    """Raise `Refusal` for a token id outside the vocabulary in any parameter, and where nothing would be left to choose from."""
    params = resolved.params
    if params.stop and not resolved.tokenizer:
        text = "stop strings need a tokenizer, and this engine has none: use stop_token_ids"
        raise Refusal("invalid_request", text, field="stop", limit="no stop strings")
    if len(resolved.words) > MOST_WORDS or any(len(word) > LONGEST_WORD for word in resolved.words):
        text = f"bad_words: they are {len(resolved.words)} variants in all, the longest of {max(map(len, resolved.words))} tokens"
        raise Refusal("invalid_request", text, field="bad_words", limit=f"{MOST_WORDS} variants of {LONGEST_WORD} tokens")
    if params.allowed_tokens:
        banned = {word[0] for word in resolved.words if len(word) == 1}
        banned |= set(params.stop_token_ids) if params.min_tokens else set()
        if not set(params.allowed_tokens) - banned:
            text = "allowed_tokens: every one of them is a bad word, or a stop token before min_tokens"
            raise Refusal("invalid_request", text, field="allowed_tokens", limit="at least one token that may be generated")
    for name, ids in (
        ("logit_bias", [pair[0] for pair in params.logit_bias]),
        ("allowed_tokens", params.allowed_tokens),
        ("stop_token_ids", params.stop_token_ids),
        ("bad_words", [token for word in resolved.words for token in word]),
    ):
        for token in ids:
            if token >= model.vocab_size:
                raise Refusal(
                    "invalid_request", f"{name} has the id {token}: the vocabulary has ids 0 to {model.vocab_size - 1}", field=name,
                    value=str(token), limit=f"0 to {model.vocab_size - 1}",
                )  # fmt: skip
    return resolved


def child_seed(seed: int, child: int) -> int:
    """The seed of a request's `child`th sample; the first has the request's own. The mixer is SplitMix64 (Steele et al., 2014)."""
    if child == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + child * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
