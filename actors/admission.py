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
from penstock.actors.messages import Encode, Encoded, Find, Found
from penstock.actors.protocol import Generate
from penstock.actors.request import OpenRequest
from penstock.actors.resolve import Adapted, Model, check_standing, own_tenant, read_wish, resolve, resolved_from_wire
from penstock.actors.tally import Tally, fits
from penstock.engine.chat import check_messages
from penstock.engine.lora.recipe import Wish
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

    def admit(self, request: OpenRequest, message: Generate, model: Model, journal: Journal, held: Held, now: float) -> Job:
        """Judge a request. Returns its job, which may be complete at once. Raises `Refusal`."""
        if not 0 < len(message.request) <= LONGEST_NAME:
            raise _bad("request", message.request, f"1 to {LONGEST_NAME} characters")
        check_standing(message.tenant, message.priority)
        user = request.session.user
        message = replace(message, tenant=own_tenant(message.tenant, user))
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
        if message.resume is not None:
            return self._admit_again(request, message.resume, message.adapter_token, model, journal, held)
        if message.messages is not None:
            try:
                check_messages(message.messages)
            except TokenizeError as error:
                raise Refusal(error.code, error.message, field=error.field) from error
        wish = None if message.adapter is None else read_wish(message.adapter)
        _check_adapters(wish, model)
        try:
            params, options = SamplingParams.from_wire(message.params), PromptOptions.from_wire(message.options)
        except InvalidParameter as error:
            raise Refusal("invalid_request", str(error), field=error.field, value=error.value, limit=error.limit) from error
        request.streams, tokens = params.n, _guess_tokens(message)
        self._limit(message.tenant, request.streams, journal, held, tokens)
        words = tuple(word for word in params.bad_words if isinstance(word, str))
        if message.ids is not None and len(message.ids) % 4:
            raise _bad("ids", f"{len(message.ids)} bytes", "little-endian 32-bit integers")
        job = self._job(request, Asked(message, params, options, wish), message.tenant, wish, message.adapter_token)
        if message.ids is None or words:
            job.encode = Encode(job.number, message.prompt, message.messages, options.to_wire(), words)
        if not job.complete:
            self._keep(job, params.n, params.n * tokens)
        return job

    def _admit_again(
        self, request: OpenRequest, resume: Mapping[str, Any], token: str | None, model: Model, journal: Journal, held: Held
    ) -> Job:
        """A request that was begun before, here or elsewhere."""
        resolved = resolved_from_wire(resume, model)
        request.resolved = resolved = replace(resolved, tenant=own_tenant(resolved.tenant, request.session.user))
        request.streams = resolved.params.n
        self._limit(resolved.tenant, request.streams, journal, held, resolved.prompt_tokens)
        received = self.received_ids(resume, request.streams, model)
        if max(map(len, received)) > resolved.limit:
            raise _bad("resume.received", max(map(len, received)), f"at most {resolved.limit} ids, as many as were asked for")
        request.received = received
        wish = None if resolved.adapter is None else resolved.adapter.wish
        _check_adapters(wish, model)
        job = self._job(request, None, resolved.tenant, wish, token)
        if not job.complete:
            self._keep(job, request.streams, request.streams * resolved.prompt_tokens)
        return job

    def find_again(self, request: OpenRequest) -> None:
        """The adapter of an open request is not where it was."""
        adapted = request.value.adapter
        if request.job is None and adapted is not None:
            self._keep(self._job(request, None, request.value.tenant, adapted.wish, request.adapter_token), 0, 0)

    def _job(self, request: OpenRequest, asked: Asked | None, tenant: str, wish: Wish | None, token: str | None) -> Job:
        self._numbers += 1
        job = Job(self._numbers, request, asked, tenant)
        if wish is not None:
            request.adapter_token = token
            job.find = Find(job.number, wish.to_wire(), token)
        return job

    def _keep(self, job: Job, streams: int, tokens: int) -> None:
        job.streams, job.tokens = streams, tokens
        self.jobs[job.number], job.request.job = job, job.number
        self._streams, self._tokens = self._streams + streams, self._tokens + tokens
        self._tally.add(job.tenant, streams, tokens)

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

    # ── tokenizers and adapters ────────────────────────────────────────────────────────────────────────────────────────────────

    def to_send(self, peers: Mapping[PeerKey, Peer]) -> Iterator[tuple[PeerKey, Encode | Find]]:
        """What nobody has yet, each with who should: prompts go to the tokenizer that is the least busy."""
        adapters = peers.get(("adapters", 0))
        if adapters is not None and adapters.ready:
            for job in self.jobs.values():
                if job.find is not None and job.found is None and job.adapters != adapters.incarnation:
                    job.adapters = adapters.incarnation
                    yield ("adapters", 0), job.find
        waiting = [job for job in self.jobs.values() if job.encode is not None and job.encoded is None and job.tokenizer is None]
        if not waiting:
            return
        ready = {key[1]: peer for key, peer in peers.items() if peer.kind == "tokenizer" and peer.ready}
        busy = dict.fromkeys(ready, 0)
        for job in self.jobs.values():
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

    def late(self, now: float) -> list[tuple[OpenRequest, str, str]]:
        """Requests that are not resolved yet and whose time is over, each with the reason for its end and the actor that it waits for."""
        waiting = [
            (job.request, "tokenizer" if job.encode is not None and job.encoded is None else "adapters")
            for job in self.jobs.values()
            if not job.request.entries
        ]
        times = [(one, name, getattr(one, name), actor) for one, actor in waiting for name in ("deadline", "queue_timeout")]
        return [(one, name, actor) for one, name, end, actor in times if end is not None and end <= now]

    def answered(self, message: Encoded | Found) -> Job | None:
        """A part of a job is done. Returns the job if that was all, or if it failed: then it is over. None also if it was before."""
        job = self.jobs.get(message.job)
        if job is None:
            return None
        if isinstance(message, Encoded):
            job.encoded, job.tokenizer = message, None
        else:
            job.found = message
        return self.done(job.number) if job.complete or message.error is not None else None

    def done(self, number: int) -> Job | None:
        """A job is over; None if it was before."""
        job = self.jobs.pop(number, None)
        if job is not None:
            self._streams, self._tokens, job.request.job = self._streams - job.streams, self._tokens - job.tokens, None
            self._tally.remove(job.tenant, job.streams, job.tokens)
        return job

    def forget(self, request: OpenRequest) -> None:
        if request.job is not None:
            self.done(request.job)

    def resolve(self, job: Job, model: Model, journal: Journal) -> None:
        """The answers make the value whole. Raises `Refusal`."""
        for answer in (job.encoded, job.found):
            if answer is not None and answer.error is not None:
                raise Refusal.of(Fault.from_wire(answer.error))
        digest = ""
        if job.found is not None:
            place = job.request.adapter = job.found.place
            digest = place[0].hex()
            if place[1] > model.adapter_pages:
                text = f"the adapter takes {place[1]} pages of 16 ranks"
                raise Refusal("adapter_error", text, field="adapter", value=str(place[1]), limit=f"{model.adapter_pages} pages")
        if job.asked is None:
            began = job.request.value.adapter
            if began is not None and began.digest != digest:
                text = f"the request was begun on another adapter than {began.wish.text[:120]!r} is here: their digests are not the same"
                raise Refusal("digest_mismatch", text, field="resume.adapter", value=began.digest[:120], limit=digest)
            return
        message, params = job.asked.message, job.asked.params
        words = [word for word in params.bad_words if isinstance(word, tuple)]
        if job.encoded is not None:
            words += [tuple(variant) for variants in job.encoded.words for variant in variants]
        resolved = resolve(
            params,
            message.ids if message.ids is not None else job.encoded.ids if job.encoded is not None else b"",
            tuple(dict.fromkeys(words)),
            model,
            adapter=Adapted(job.asked.wish, digest) if job.asked.wish is not None else None,
            priority=message.priority,
            tenant=message.tenant,
            seed=self._random.getrandbits(63),
            truncate=job.asked.options.truncate if message.ids is not None else None,
        )
        self._limit_tokens(resolved.tenant, resolved.params.n * resolved.prompt_tokens, journal)
        job.request.resolved = resolved


def _check_adapters(wish: Wish | None, model: Model) -> None:
    if wish is not None and not model.adapter_pages:
        name = wish.text[:120]
        raise Refusal("unknown_adapter", f"no adapter {name!r}: this engine serves none", field="adapter", value=name, limit="none")


def _overloaded(text: str, limit: str) -> Refusal:
    return Refusal("overloaded", text, limit=limit, retry_after=1.0)


def _guess_tokens(message: Generate) -> int:
    """About how many tokens a prompt has, before it is tokenized: four characters each."""
    if message.ids is not None:
        return len(message.ids) // 4
    return len(message.prompt if message.prompt is not None else repr(message.messages)) // 4


def _bad(name: str, value: object, limit: str) -> Refusal:
    return Refusal("invalid_request", f"{name}={str(value)[:120]!r}: must be {limit}", field=name, value=str(value)[:120], limit=limit)
