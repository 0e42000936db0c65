"""Jobs: what requests wait for before they can be resolved, at the tokenizers and at the adapters actor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from penstock.actors.actor import ADAPTERS, Peer, PeerKey
from penstock.actors.messages import Encode, Encoded, Find, Found, Leave
from penstock.actors.protocol import Generate
from penstock.actors.request import OpenRequest
from penstock.actors.tally import Tally
from penstock.engine.lora.recipe import Wish
from penstock.engine.params import PromptOptions, SamplingParams

AT_ONCE = 2  # jobs that a tokenizer has: one that dies takes few with it
MOST_TRIES = 3  # tokenizers that may die on one request


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, of a request that is not resolved yet."""

    message: Generate
    params: SamplingParams
    options: PromptOptions
    wish: Wish | None


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits for its prompt's ids, for its adapter, or for both. Of one that is resolved, `asked` is None."""

    number: int
    request: OpenRequest
    asked: Asked | None
    tenant: str
    streams: int = 0  # that count as open
    tokens: int = 0  # about as many will its prompt have, of all streams
    encode: Encode | None = None
    encoded: Encoded | None = None
    find: Find | None = None
    found: Found | None = None
    adapters: int = 0  # incarnation of who was asked for its adapter
    tokenizer: tuple[int, int] | None = None  # index and incarnation of who has its prompt
    turn: int = 0  # it was sent after those with smaller ones
    tries: int = 0  # tokenizers that died at it

    @property
    def complete(self) -> bool:
        return (self.encode is None or self.encoded is not None) and (self.find is None or self.found is not None)


class Jobs:
    """All that are under way. Numbers have the gateway's incarnation in their upper half: what a tokenizer answers to a former one is
    nobody's prompt. `streams` and `tokens` are of all of them, and `tally` has them by tenant."""

    def __init__(self, incarnation: int) -> None:
        self.streams = self.tokens = 0
        self.tally = Tally()
        self._open: dict[int, Job] = {}
        self._numbers = incarnation << 32
        self._turns = 0
        self._stirred = False  # something may be sent that could not be before
        self._left: list[int] = []  # that the adapters actor need not answer any more

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._open.values())

    def new(
        self, request: OpenRequest, asked: Asked | None, tenant: str, wish: Wish | None, token: str | None, digest: str | None = None
    ) -> Job:
        """A job that nobody has yet; `keep` it if it is not complete. `digest` is that of the adapter that the request began with."""
        self._numbers += 1
        job = Job(self._numbers, request, asked, tenant)
        if wish is not None:
            request.adapter_token = token
            job.find = Find(job.number, wish.to_wire(), token, digest)
        return job

    def keep(self, job: Job, streams: int, tokens: int) -> None:
        """It waits for somebody; meanwhile its streams and tokens count as open."""
        self._stirred = True
        job.streams, job.tokens = streams, tokens
        self._open[job.number], job.request.job = job, job.number
        self.streams, self.tokens = self.streams + streams, self.tokens + tokens
        self.tally.add(job.tenant, streams, tokens)

    def to_send(self, peers: Mapping[PeerKey, Peer]) -> Iterator[tuple[PeerKey, Encode | Find | Leave]]:
        """What nobody has yet, each with who should: prompts go to the tokenizer that is the least busy; and what nobody waits for any
        more. When peers have changed, `reassign` comes first."""
        if not self._stirred:
            return
        self._stirred = False
        adapters = peers.get(ADAPTERS)
        left, self._left = self._left, []  # whoever was asked is ready for as long as it lives: one that is not has none of these
        if adapters is not None and adapters.ready:
            for number in left:
                yield ADAPTERS, Leave(number)
            for job in self._open.values():
                if job.find is not None and job.found is None and job.adapters != adapters.incarnation:
                    job.adapters = adapters.incarnation
                    yield ADAPTERS, job.find
        waiting = [job for job in self._open.values() if job.encode is not None and job.encoded is None and job.tokenizer is None]
        if not waiting:
            return
        ready = {key[1]: peer for key, peer in peers.items() if peer.kind == "tokenizer" and peer.ready}
        busy = dict.fromkeys(ready, 0)
        for job in self._open.values():
            if job.tokenizer is not None and job.tokenizer[0] in busy:
                busy[job.tokenizer[0]] += 1
        for job in waiting if ready else ():
            index = min(busy, key=lambda candidate: (busy[candidate], candidate))
            if busy[index] >= AT_ONCE or job.encode is None:
                return
            busy[index] += 1
            self._turns += 1
            job.tokenizer, job.turn = (index, ready[index].incarnation), self._turns
            yield ("tokenizer", index), job.encode

    def reassign(self, peers: Mapping[PeerKey, Peer]) -> list[Job]:
        """Take jobs back from tokenizers that died. Each was at the first of those that it had; that counts. Returns the jobs at which too
        many died, which are given up."""
        self._stirred = True
        alive = {(key[1], peer.incarnation) for key, peer in peers.items() if peer.kind == "tokenizer"}
        back = [job for job in self._open.values() if job.tokenizer is not None and job.tokenizer not in alive]
        for dead in {job.tokenizer for job in back}:
            min((job for job in back if job.tokenizer == dead), key=lambda job: job.turn).tries += 1
        for job in back:
            job.tokenizer = None
        given_up = [job for job in back if job.tries >= MOST_TRIES]
        for job in given_up:
            self.done(job.number)
        return given_up

    def late(self, now: float) -> list[tuple[OpenRequest, str, str]]:
        """Requests that are not resolved yet and whose time is over, each with the reason for its end and the actor that it waits for."""
        waiting = [
            (job.request, "tokenizer" if job.encode is not None and job.encoded is None else "adapters")
            for job in self._open.values()
            if not job.request.entries
        ]
        times = [(one, name, getattr(one, name), actor) for one, actor in waiting for name in ("deadline", "queue_timeout")]
        return [(one, name, actor) for one, name, end, actor in times if end is not None and end <= now]

    def answered(self, message: Encoded | Found) -> Job | None:
        """A part of a job is done. Returns the job if that was all, or if it failed: then it is over. None also if it was before."""
        job = self._open.get(message.job)
        if job is None:
            return None
        self._stirred = True
        if isinstance(message, Encoded):
            job.encoded, job.tokenizer = message, None
        else:
            job.found = message
        return self.done(job.number) if job.complete or message.error is not None else None

    def done(self, number: int) -> Job | None:
        """A job is over; None if it was before."""
        job = self._open.pop(number, None)
        if job is not None:
            self._stirred = True  # its tokenizer may take another one
            self.streams, self.tokens, job.request.job = self.streams - job.streams, self.tokens - job.tokens, None
            self.tally.remove(job.tenant, job.streams, job.tokens)
            if job.adapters and job.found is None:
                self._left.append(number)
        return job

    def forget(self, request: OpenRequest) -> None:
        if request.job is not None:
            self.done(request.job)
