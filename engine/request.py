"""The request: a value that any actor can be handed and carry on from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
BadWords = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How one request's tokens are drawn, with every default resolved: what the executor keeps for a slot.

    The noise for a token is a hash of (`seed`, absolute position, token id), so there is no generator state to keep or lose.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] = ()
    bad_words: BadWords = ()
    seed: int = 0
    min_tokens: int = 0  # `stop_ids` are masked until so many tokens are generated
    stop_ids: tuple[int, ...] = ()  # end-of-sequence ids (unless ignored) and the request's stop token ids
    logprobs: int = -1  # -1: none; k >= 0: of the chosen token and of the k likeliest
    prompt_logprobs: int = -1

    @property
    def counts_tokens(self) -> bool:
        """Whether token counts of the prompt and the output change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Adapter:
    """What changes a model's products for a request. `digest` is that of its content: equal ones give equal tokens. It takes `pages` pages
    of `engine.lora.layout`, and they are in the file `path`."""

    digest: bytes
    pages: int
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One stream to generate. Equal values give equal continuations, on any actor, at any time.

    `prompt` and `generated` are token ids, int32; `generated` holds what was released before this attempt. `limit` is the most
    tokens to generate in all. `deadline` is on the monotonic clock, in seconds.
    """

    handle: int
    attempt: int
    prompt: Tokens
    generated: Tokens
    limit: int
    sampler: Sampler
    priority: int = 0  # higher runs first
    tenant: str = ""
    salt: bytes = b""  # requests share cached prefixes only under the same salt, and with the same adapter
    adapter: Adapter | None = None
    deadline: float | None = None
    queue_timeout: float | None = None  # seconds on the monotonic clock by which it must have started
