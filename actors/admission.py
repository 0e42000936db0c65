"""Admission: what is let in, and how it becomes a resolved value. The gateway's judgement, without its sockets."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from penstock.actors.actor import Peer, PeerKey
from penstock.actors.columns import int32
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault, Refusal
from penstock.actors.journal import Journal
from penstock.actors.messages import Encode, Encoded
from penstock.actors.protocol import Generate
from penstock.actors.request import OpenRequest
from penstock.actors.resolve import Model, check_standing, own_tenant, resolve, resolved_from_wire
from penstock.actors.tally import Tally, fits
from penstock.engine.chat import check_messages
from penstock.engine.params import LONGEST_NAME, InvalidParameter, PromptOptions, SamplingParams
from penstock.engine.tokenfiles import TokenizeError

AT_ONCE = 2  # jobs that a tokenizer has: one that dies takes few with it
ENDED = 4  # times `max_open`: streams kept of all clients, most of them ended and not acknowledged yet
MOST_TRIES = 3  # tokenizers that may die on one request


@dataclass(frozen=True, slots=True)
class Held:
    """Streams that are kept, ended ones that are not acknowledged yet included: of a client (or all clients of its user), and of all."""

    mine: int = 0
    all: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """A request at a tokenizer."""

    number: int
    request: OpenRequest
    message: Generate
    params: SamplingParams
    options: PromptOptions
    encode: Encode
    tokens: int  # about as many will its prompt have
    tokenizer: tuple[int, int] | None = None  # index and incarnation of who has it
    turn: int = 0  # it was sent after those with smaller ones
    tries: int = 0  # tokenizers that died at it


class Admission:
    """Numbers of jobs have the gateway's incarnation in their upper half: what a tokenizer answers to a former one is nobody's prompt."""

    def __init__(self, config: EngineConfig, incarnation: int) -> None:
        self.config = config
        self.jobs: dict[int, Job] = {}
        self._streams = self._tokens = 0  # of all jobs
        self._tally = Tally()
        self._numbers = incarnation << 32
        self._turns = 0
        self._random = random.Random()

    def admit(self, request: OpenRequest, message: Generate, model: Model, journal: Journal, held: Held, now: float) -> Job | None:
        """Judge a request. Returns the tokenizer job that it needs, or None if it is resolved at once. Raises `Refusal`."""
        if not 0 < len(message.request) <= LONGEST_NAME:
            raise _bad("request", message.request, f"1 to {LONGEST_NAME} characters")
        check_standing(message.tenant, message.priority)
        user = request.session.user
        message = replace(message, tenant=own_tenant(message.tenant, user))
        if message.adapter is not None:
            name = message.adapter[:120]
            raise Refusal("unknown_adapter", f"no adapter {name!r} is loaded", field="adapter", value=name, limit="a loaded adapter")
        for name in ("deadline", "queue_timeout"):
            seconds = getattr(message, name)
            if seconds is not None and not 0 < seconds <= 1e9:
                raise _bad(name, seconds, "seconds, above 0")
        request.deadline = None if message.deadline is None else now + message.deadline
        request.queue_timeout = None if message.queue_timeout is None else now + message.queue_timeout
        given = [name for name in ("prompt", "messages", "ids", "resume") if getattr(message, name) is not None]
        if len(given) != 1:
            raise _bad("prompt", given, "exactly one of prompt, messages, ids and resume")
        if message.prompt == "" or message.messages == ():
            raise _bad(given[0], "", "not empty")
        if message.messages is not None:
            try:
                check_messages(message.messages)
            except TokenizeError as error:
                raise Refusal(error.code, error.message, field=error.field) from error
        if message.resume is not None:
            resolved = resolved_from_wire(message.resume, model)
            request.resolved = resolved = replace(resolved, tenant=own_tenant(resolved.tenant, user))
            request.streams = resolved.params.n
            self._limit(resolved.tenant, request.streams, journal, held, resolved.prompt_tokens)
            received = self.received_ids(message.resume, request.streams, model)
            if max(map(len, received)) > resolved.limit:
                raise _bad("resume.received", max(map(len, received)), f"at most {resolved.limit} ids, as many as were asked for")
            request.received = received
            return None
        try:
            params, options = SamplingParams.from_wire(message.params), PromptOptions.from_wire(message.options)
        except InvalidParameter as error:
            raise Refusal("invalid_request", str(error), field=error.field, value=error.value, limit=error.limit) from error
        request.streams, tokens = params.n, _guess_tokens(message)
        self._limit(message.tenant, request.streams, journal, held, tokens)
        words = tuple(word for word in params.bad_words if isinstance(word, str))
        if message.ids is not None and len(message.ids) % 4:
            raise _bad("ids", f"{len(message.ids)} bytes", "little-endian 32-bit integers")
        self._numbers += 1
        encode = Encode(self._numbers, message.prompt, message.messages, options.to_wire(), words)
        job = Job(self._numbers, request, message, params, options, encode, params.n * tokens)
        if message.ids is not None and not words:
            self.resolve(job, Encoded(job.number, b"", (), None), model, journal)
            return None
        self.jobs[job.number], request.job = job, job.number
        self._streams, self._tokens = self._streams + params.n, self._tokens + job.tokens
        self._tally.add(message.tenant, params.n, job.tokens)
        return job

    def _limit(self, tenant: str, streams: int, journal: Journal, held: Held, tokens: int) -> None:
        most = self.config.max_open
        waiting, mine = len(journal.entries) + self._streams, self._held(tenant, journal)[0]
        own = min(most, self.config.max_open_per_client)
        if held.mine + streams > own:
            raise _overloaded(f"{held.mine} streams of this client are open", f"{own} streams")
        for open_now, tenants_own, limit, whose in (
            (waiting, mine, most, ""),
            (held.all, max(mine, held.mine), ENDED * most, ", or have ended and are not acknowledged"),
        ):
            if not fits(open_now, tenants_own, streams, limit, self._tenants(journal)):
                raise _overloaded(f"{open_now} streams{whose} are open", f"{limit} streams")
        self._limit_tokens(tenant, streams * tokens, journal)

    def _limit_tokens(self, tenant: str, tokens: int, journal: Journal) -> None:
        """Prompts that wait to be tokenized count, too: their text takes memory."""
        most = self.config.max_queued_tokens
        queued = journal.prompt_tokens + self._tokens
        if queued and not fits(queued, self._held(tenant, journal)[1], tokens, most, self._tenants(journal)):
            raise _overloaded(f"open requests have {queued} prompt tokens", f"{most} tokens")

    def _held(self, tenant: str, journal: Journal) -> tuple[int, int]:
        """Open streams of a tenant, and their prompt tokens."""
        (streams, tokens), (more, longer) = journal.tally.of(tenant), self._tally.of(tenant)
        return streams + more, tokens + longer

    def _tenants(self, journal: Journal) -> int:
        """With something open, and one that comes; some count twice while a prompt of theirs is tokenized."""
        return len(journal.tally) + len(self._tally) + 1

    def received_ids(self, resume: Mapping[str, Any], streams: int, model: Model | None = None) -> list[array[int]]:
        """What a client that resumes says it has of each stream. Raises `Refusal`."""
        received = resume.get("received")
        if not isinstance(received, list | tuple) or len(received) != streams:
            raise _bad("resume.received", type(received).__name__, f"the ids of each of the {streams} streams")
        result = []
        for buffer in received:
            if not isinstance(buffer, bytes) or len(buffer) % 4:
                raise _bad("resume.received", type(buffer).__name__, "little-endian 32-bit integers")
            ids = array("i", buffer)
            column = int32(buffer)
            if model is not None and len(column) and not 0 <= int(column.min()) <= int(column.max()) < model.vocab_size:
                raise _bad("resume.received", int(column.max()), f"ids from 0 to {model.vocab_size - 1}")
            result.append(ids)
        return result

    # ── tokenizers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def to_send(self, peers: Mapping[PeerKey, Peer]) -> Iterator[tuple[int, Encode]]:
        """Jobs that no tokenizer has, each with the index of one that is ready, the least busy first."""
        waiting = [job for job in self.jobs.values() if job.tokenizer is None]
        if not waiting:
            return
        ready = {key[1]: peer for key, peer in peers.items() if peer.kind == "tokenizer" and peer.ready}
        busy = dict.fromkeys(ready, 0)
        for job in self.jobs.values():
            if job.tokenizer is not None and job.tokenizer[0] in busy:
                busy[job.tokenizer[0]] += 1
        for job in waiting if ready else ():
            index = min(busy, key=lambda candidate: (busy[candidate], candidate))
            if busy[index] >= AT_ONCE:
                return
            busy[index] += 1
            self._turns += 1
            job.tokenizer, job.turn = (index, ready[index].incarnation), self._turns
            yield index, job.encode

    def reassign(self, peers: Mapping[PeerKey, Peer]) -> list[Job]:
        """Take jobs back from tokenizers that died. Each was at the first of those that it had; that counts. Returns the jobs at which too
        many died, which are given up."""
        alive = {(key[1], peer.incarnation) for key, peer in peers.items() if peer.kind == "tokenizer"}
        back = [job for job in self.jobs.values() if job.tokenizer is not None and job.tokenizer not in alive]
        for dead in {job.tokenizer for job in back}:
            min((job for job in back if job.tokenizer == dead), key=lambda job: job.turn).tries += 1
        for job in back:
            job.tokenizer = None
        given_up = [job for job in back if job.tries >= MOST_TRIES]
        for job in given_up:
            self.done(job.number)
        return given_up

    def late(self, now: float) -> list[tuple[OpenRequest, str]]:
        """Requests that are still being tokenized and whose time is over, each with the reason for its end."""
        waiting = [job.request for job in self.jobs.values()]
        times = [(one, name, getattr(one, name)) for one in waiting for name in ("deadline", "queue_timeout")]
        return [(one, name) for one, name, end in times if end is not None and end <= now]

    def done(self, number: int) -> Job | None:
        """A job is over; None if it was before."""
        job = self.jobs.pop(number, None)
        if job is not None:
            self._streams, self._tokens, job.request.job = self._streams - job.params.n, self._tokens - job.tokens, None
            self._tally.remove(job.message.tenant, job.params.n, job.tokens)
        return job

    def forget(self, request: OpenRequest) -> None:
        if request.job is not None:
            self.done(request.job)

    def resolve(self, job: Job, encoded: Encoded, model: Model, journal: Journal) -> None:
        """The tokenizer's answer makes the value whole. Raises `Refusal`."""
        if encoded.error is not None:
            error = Fault.from_wire(encoded.error)
            raise Refusal(error.code, error.message, field=error.field, value=error.value, limit=error.limit, actor=error.actor)
        words = [word for word in job.params.bad_words if isinstance(word, tuple)]
        words += [tuple(variant) for variants in encoded.words for variant in variants]
        resolved = resolve(
            job.params,
            job.message.ids if job.message.ids is not None else encoded.ids,
            tuple(dict.fromkeys(words)),
            model,
            adapter=None,
            priority=job.message.priority,
            tenant=job.message.tenant,
            seed=self._random.getrandbits(63),
            truncate=job.options.truncate if job.message.ids is not None else None,
        )
        self._limit_tokens(resolved.tenant, resolved.params.n * resolved.prompt_tokens, journal)
        job.request.resolved = resolved


def _overloaded(text: str, limit: str) -> Refusal:
    return Refusal("overloaded", text, limit=limit, retry_after=1.0)


def _guess_tokens(message: Generate) -> int:
    """About how many tokens a prompt has, before it is tokenized: four characters each."""
    if message.ids is not None:
        return len(message.ids) // 4
    return len(message.prompt if message.prompt is not None else repr(message.messages)) // 4


def _bad(name: str, value: object, limit: str) -> Refusal:
    return Refusal("invalid_request", f"{name}={str(value)[:120]!r}: must be {limit}", field=name, value=str(value)[:120], limit=limit)
