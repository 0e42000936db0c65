"""Admission: what is let in, and how it becomes a resolved value. The gateway's judgement, without its sockets."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from penstock.actors.columns import int32
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault, Refusal, too_many_pages
from penstock.actors.jobs import Asked, Job, Jobs
from penstock.actors.journal import Journal
from penstock.actors.messages import Encode
from penstock.actors.protocol import Generate
from penstock.actors.request import OpenRequest
from penstock.actors.resolve import Adapted, Model, check_standing, own_tenant, read_wish, resolve, resolved_from_wire
from penstock.actors.tally import fits
from penstock.engine.chat import check_messages
from penstock.engine.lora.recipe import Wish
from penstock.engine.lora.residency import largest_adapter
from penstock.engine.params import LONGEST_NAME, InvalidParameter, PromptOptions, SamplingParams
from penstock.engine.tokenfiles import TokenizeError

TOKEN = re.compile(r"[\x21-\x7e]{1,8192}")  # what a source wants
ENDED = 4  # times `max_open`: streams kept of all clients, most of them ended and not acknowledged yet


@dataclass(frozen=True, slots=True)
class Held:
    """Streams that are kept, ended ones that are not acknowledged yet included: of a client (or all clients of its user), and of all."""

    mine: int = 0
    all: int = 0


class Admission:
    """What it lets in may have a job to wait for, in `jobs`, before `resolve`."""

    def __init__(self, config: EngineConfig, incarnation: int) -> None:
        self.config = config
        self.jobs = Jobs(incarnation)
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
        if message.adapter_token is not None and not TOKEN.fullmatch(message.adapter_token):
            raise _bad("adapter_token", "…", "1 to 8192 printable ASCII characters without spaces")
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
        job = self.jobs.new(request, Asked(message, params, options, wish), message.tenant, wish, message.adapter_token)
        if message.ids is None or words:
            job.encode = Encode(job.number, message.prompt, message.messages, options.to_wire(), words)
        if not job.complete:
            self.jobs.keep(job, params.n, params.n * tokens)
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
        job = self.jobs.new(request, None, resolved.tenant, wish, token, None if resolved.adapter is None else resolved.adapter.digest)
        if not job.complete:
            self.jobs.keep(job, request.streams, request.streams * resolved.prompt_tokens)
        return job

    def find_again(self, request: OpenRequest) -> None:
        """The adapter of an open request is not where it was."""
        adapted = request.value.adapter
        if request.job is None and adapted is not None:
            job = self.jobs.new(request, None, request.value.tenant, adapted.wish, request.adapter_token, adapted.digest)
            self.jobs.keep(job, 0, 0)

    def _limit(self, tenant: str, streams: int, journal: Journal, held: Held, tokens: int) -> None:
        most = self.config.max_open
        waiting, mine = len(journal.entries) + self.jobs.streams, self._held(tenant, journal)[0]
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
        queued = journal.prompt_tokens + self.jobs.tokens
        if queued and not fits(queued, self._held(tenant, journal)[1], tokens, most, self._tenants(journal)):
            raise _overloaded(f"open requests have {queued} prompt tokens", f"{most} tokens")

    def _held(self, tenant: str, journal: Journal) -> tuple[int, int]:
        """Open streams of a tenant, and their prompt tokens."""
        (streams, tokens), (more, longer) = journal.tally.of(tenant), self.jobs.tally.of(tenant)
        return streams + more, tokens + longer

    def _tenants(self, journal: Journal) -> int:
        """With something open, and one that comes; some count twice while a prompt of theirs is tokenized."""
        return len(journal.tally) + len(self.jobs.tally) + 1

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

    def resolve(self, job: Job, model: Model, journal: Journal) -> None:
        """The answers make the value whole. Raises `Refusal`."""
        for answer in (job.encoded, job.found):
            if answer is not None and answer.error is not None:
                raise Refusal.of(Fault.from_wire(answer.error))
        digest = ""
        if job.found is not None:
            place = job.request.adapter = job.found.place
            digest = place[0].hex()
            most = largest_adapter(model.adapter_pages)
            if place[1] > most:
                raise too_many_pages(place[1], most, model.adapter_pages)
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
