"""A request inside the scheduler: the value, what is known of it so far, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from penstock.engine.blocks import chain_digest, root_digest
from penstock.engine.commit import Ended
from penstock.engine.plan import Fill, TopLogprobs
from penstock.engine.request import Request, Tokens

NOWHERE = -1  # a slot or a stay that nothing has
NO_TOKENS: Tokens = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class Stream:
    """The mutable companion of a `Request`, owned by the scheduler. While it has a slot, the slot's row in the columns is the truth
    and `tokens` is stale; `tokens` is the truth while it waits."""

    request: Request
    number: int  # order of submission: lower is older
    arrived: float
    tokens: Tokens  # prompt and generated, int32
    slot: int = NOWHERE
    stay: int = NOWHERE  # the last stay in a slot whose results still count
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of known tokens, as far as they were needed
    in_flight: int = 0  # sampled tokens of launched steps; only kept up to date while preempted
    gone: bool = False
    started: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    prompt_parts: list[TopLogprobs] = field(default_factory=list)  # of prefill chunks done so far

    @property
    def handle(self) -> int:
        return self.request.handle

    @property
    def attempt(self) -> int:
        return self.request.attempt

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def adapter(self) -> bytes:
        """The digest of its adapter; empty: the base model."""
        return b"" if self.request.adapter is None else self.request.adapter.digest

    @property
    def total(self) -> int:
        """The length, in tokens, at which it ends at the latest."""
        return len(self.request.prompt) + self.request.limit

    @property
    def tells_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still owed: they come once, before any token."""
        return self.request.sampler.prompt_logprobs >= 0 and len(self.tokens) == len(self.request.prompt)

    def chain(self, blocks: int, tokens: Tokens, block_size: int) -> list[bytes]:
        """The chained digests of at least the first `blocks` blocks of `tokens`, which are all of this stream's known tokens."""
        known = len(self.digests)
        if known < blocks:
            parent = self.digests[-1] if known else root_digest(self.request.salt, self.adapter)
            content = tokens[known * block_size : blocks * block_size].tobytes()
            width = block_size * tokens.itemsize
            for at in range(0, len(content), width):
                parent = chain_digest(parent, content[at : at + width])
                self.digests.append(parent)
        return self.digests

    def filling(self, pages: tuple[int, ...]) -> Fill:
        """How the executor prepares the slot that this stream was just given. Its adapter is in `pages`."""
        sampler = self.request.sampler
        if sampler.prompt_logprobs >= 0 and not self.tells_prompt:
            sampler = replace(sampler, prompt_logprobs=-1)
        needs_history = sampler.counts_tokens or sampler.bad_words or sampler.prompt_logprobs >= 0
        return Fill(self.slot, len(self.request.prompt), sampler, self.tokens if needs_history else NO_TOKENS, pages)

    def take(self, token: int) -> str | None:
        """A result that came after this stream left its slot. Returns why it ends with it, or None."""
        self.in_flight -= 1
        self.tokens = np.append(self.tokens, np.int32(token))
        if token in self.request.sampler.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.total else None

    def account(self, reason: str, now: float) -> Ended:
        """What it cost, now that it ends."""
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        costs = self.cached_tokens, self.preemptions, started - self.arrived, first - started, now - first
        return Ended(self.handle, self.attempt, reason, *costs)

    def keep_prompt_part(self, part: TopLogprobs, row: int) -> None:
        """Keep the log-probabilities of one prefill chunk, `row` of its step."""
        mine = part.rows == row
        self.prompt_parts.append(TopLogprobs(part.rows[mine], part.ids[mine], part.values[mine], part.ranks[mine]))

    def take_prompt_parts(self) -> TopLogprobs:
        """The log-probabilities of the whole prompt, once it is computed."""
        parts, self.prompt_parts = self.prompt_parts, []
        return TopLogprobs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "ids", "values", "ranks")))


def known_tokens(request: Request) -> Tokens:
    return np.concatenate([request.prompt, request.generated]).astype(np.int32, copy=False)
