"""A request inside the scheduler: the value, what is known of it so far, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from penstock.engine.blocks import chain_digest, root_digest
from penstock.engine.plan import TopLogprobs
from penstock.engine.request import Request, Tokens


@dataclass(slots=True, eq=False)
class Stream:
    """The mutable companion of a `Request`, owned by the scheduler. While it has a slot, the slot's row in the scheduler's arrays is
    the truth and `tokens` is stale; `tokens` is the truth while it waits."""

    request: Request
    number: int  # order of submission: lower is older
    arrived: float
    tokens: Tokens  # prompt and generated, int32
    slot: int = -1
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
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def rank(self) -> tuple[int, int]:
        """Who yields: the smallest rank is preempted first (lowest priority, then newest)."""
        return (self.request.priority, -self.number)

    @property
    def total(self) -> int:
        """The length, in tokens, at which it ends at the latest."""
        return len(self.request.prompt) + self.request.limit

    def digest(self, index: int, tokens: Tokens, block_size: int) -> bytes:
        """The chained digest of full block `index` of `tokens`, which are all of this stream's known tokens."""
        while len(self.digests) <= index:
            at = len(self.digests)
            parent = self.digests[-1] if at else root_digest(self.request.salt)
            self.digests.append(chain_digest(parent, tokens[at * block_size : (at + 1) * block_size].tobytes()))
        return self.digests[index]


def known_tokens(request: Request) -> Tokens:
    return np.concatenate([request.prompt, request.generated]).astype(np.int32, copy=False)
