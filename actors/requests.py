"""The life of requests, from the moment a client asks to the one when nothing of them is kept: see `actors.request`.

Whatever ends a request ends it here: `end` one of its streams, `fail` the whole, `finish` forgets it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from penstock.actors.actor import SCHEDULER, Peer, PeerKey
from penstock.actors.admission import Admission, Held
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault, Refusal
from penstock.actors.handover import HandOver
from penstock.actors.jobs import Job
from penstock.actors.messages import Begin, Encoded, Found, Journaled, Released
from penstock.actors.protocol import Accepted, Cancel, Failed, Generate
from penstock.actors.reception import Reception
from penstock.actors.request import Entry, OpenRequest
from penstock.actors.resolve import Model
from penstock.actors.sessions import Session

OVERDUE_S = 0.5  # after its deadline a stream is ended without the scheduler
MOST_LOSSES = 3  # of a request's adapter
JOURNALED_EVERY = 8  # of the scheduler's messages: it may be several times as many ahead


class Requests:
    """All that are open. Their clients are answered by way of `reception`; `send` is to other actors."""

    def __init__(self, config: EngineConfig, incarnation: int, reception: Reception, send: Callable[[PeerKey, Any], object]) -> None:
        self.model: Model | None = None  # unknown: nothing is admitted
        self.draining = False  # nothing new is
        self.admission = Admission(config, incarnation)
        self.handover = HandOver(incarnation, lambda message: send(SCHEDULER, message), isolate=config.isolate_prefixes)
        self.journal = self.handover.journal
        self.totals = {"requests": 0, "finished": 0, "failed": 0, "generated_tokens": 0, "prompt_tokens": 0}
        self._reception, self._sessions, self._send = reception, reception.sessions, send

    @property
    def open(self) -> set[OpenRequest]:
        """Those of which something is still to come."""
        return {entry.request for entry in self.journal.entries.values()} | {job.request for job in self.admission.jobs}

    # ── what clients ask ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(self, session: Session, message: Generate) -> None:
        now = time.monotonic()
        try:
            known = session.requests.get(message.request)
            if known is not None and known.left is not None and known.entries and message.resume is not None:
                self._reattach(session, known, message.resume)
                return
            if known is not None and known.left is None and known.state != "told":
                text = f"the client has an open request {message.request!r}"
                raise Refusal("duplicate_request", text, field="request", value=message.request[:120])
            if known is not None:  # told; or said again on a new connection, without its answer: it begins anew
                self.finish(known)
            if self.model is None or (self.draining and message.resume is None):
                code = "draining" if self.draining else "unavailable"
                raise Refusal(code, "the engine takes no new requests now", retry_after=1.0)
            request = OpenRequest(message.request, session, now)
            held = Held(self._sessions.held(session), self._sessions.streams)
            job = self.admission.admit(request, message, self.model, self.journal, held, now)
        except Refusal as refusal:
            self.totals["failed"] += 1
            self._reception.answer(session, Failed(message.request, refusal.fault.to_wire()))
            return
        self.totals["requests"] += 1
        self._sessions.add(request)
        if job.complete:
            self._resolve(job)

    def cancel(self, session: Session, message: Cancel) -> None:
        for name in message.requests:
            request = session.requests.get(name) if isinstance(name, str) else None
            if request is None:
                continue
            if request.left is not None:  # of an earlier connection: nobody is told
                self.finish(request)
            elif request.state == "tokenizing":
                self.fail(request, Fault(code="not_found", message="cancelled before it began", retryable=False))
            for entry in request.entries:
                if entry.ended is None:
                    self.handover.withdraw(entry)
                    self.end(entry, "cancelled", {})

    def _reattach(self, session: Session, request: OpenRequest, resume: dict[str, Any]) -> None:
        """A client is back on a new connection: go on where it says it is."""
        try:
            received = self.admission.received_ids(resume, len(request.entries))
            if not all(entry.rewind(ids) for entry, ids in zip(request.entries, received, strict=True)):
                raise Refusal("invalid_request", "the received ids are not those of this request", field="resume.received")
        except Refusal:
            self.finish(request)  # the error is its terminal
            raise
        self._attach(request)
        for entry in request.entries:
            session.mark(entry)

    # ── until it is accepted ───────────────────────────────────────────────────────────────────────────────────────────────────

    def send_jobs(self, peers: Mapping[PeerKey, Peer]) -> None:
        for key, message in self.admission.jobs.to_send(peers):
            self._send(key, message)

    def reassign(self, peers: Mapping[PeerKey, Peer]) -> None:
        """Actors have come or gone."""
        for job in self.admission.jobs.reassign(peers):
            self.fail(job.request, Fault(code="engine_fault", message="the tokenizer died on this request", actor="tokenizer"))

    def answered(self, message: Encoded | Found) -> None:
        job = self.admission.jobs.answered(message)
        if job is not None:  # else it waits for more, or was cancelled meanwhile
            self._resolve(job)

    def _resolve(self, job: Job) -> None:
        request, model = job.request, self.model
        if model is None:
            return
        try:
            self.admission.resolve(job, model, self.journal)
        except Refusal as refusal:
            self.fail(request, refusal.fault)
            return
        if not request.entries:
            self._accept(request, model)
        for entry in request.entries:  # of one that is open already, whose adapter was not where it had been
            if entry.ended is None and entry.unadapted:
                entry.unadapted = False
                self.handover.give(entry)

    def _accept(self, request: OpenRequest, model: Model) -> None:
        """The request is resolved: journal it, tell its client, hand it over."""
        request.tokenized = time.monotonic()
        resolved = request.value
        self.totals["prompt_tokens"] += resolved.prompt_tokens
        received = request.received or [array("i") for _ in range(resolved.params.n)]
        request.entries = [self.journal.open(request, resolved.sampler(child, model.eos), ids) for child, ids in enumerate(received)]
        if request.left is None:  # else its client has another connection by now, and will ask
            self._attach(request)
        for entry in request.entries:
            reason = entry.complete()
            if reason is not None:
                self.end(entry, reason, {})
            else:
                self.handover.give(entry)

    def _attach(self, request: OpenRequest) -> None:
        """Number the streams of a request on its client's connection, and tell it."""
        session = request.session
        request.left = None
        for entry in request.entries:
            session.streams += 1
            entry.stream = session.streams
        self._reception.answer(session, Accepted(request.id, tuple(entry.stream for entry in request.entries), request.value.to_wire()))

    # ── while it runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, message: Begin) -> OpenRequest | None:
        """A scheduler holds nothing: give it all. Returns the request that is guilty of an executor's death, if one is found to be."""
        guilty = self.handover.begin(message)
        if guilty is not None:
            text = "the executor died whenever this request was in its step, also when it was the only one there"
            self.fail(guilty.request, Fault(code="engine_fault", message=text, actor="executor", retryable=False))
        for entry in list(self.journal.entries.values()):
            self.handover.give(entry)
        return None if guilty is None else guilty.request

    def released(self, message: Released) -> None:
        taken = self.journal.take(message)
        self.totals["generated_tokens"] += taken.tokens
        for entry, reason, facts in taken.ends:
            if reason == "adapter_lost":
                self._find_again(entry)
            elif reason == "error":
                self.fail(entry.request, Fault(code=facts.get("code", "engine_fault"), message=facts.get("error", "")))
            else:
                self.end(entry, reason, facts)
        self.handover.mend(taken)
        if message.number % JOURNALED_EVERY == 0:
            self._send(SCHEDULER, Journaled(message.index, message.number))

    def _find_again(self, entry: Entry) -> None:
        """Its adapter was not where it had been: somebody has tidied up, perhaps."""
        request, made = entry.request, sum(len(one.ids) for one in entry.request.entries)
        entry.unadapted = True
        if made > request.made:
            request.made, request.losses = made, 0
        request.losses += request.job is None
        if request.losses > MOST_LOSSES:
            text = "the adapter could not be loaded, although it was made ready again: see the executor's log"
            self.fail(request, Fault(code="adapter_error", message=text, field="adapter", actor="executor"))
            return
        self.admission.find_again(request)

    # ── its end ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def expire(self, now: float) -> None:
        """End those whose deadline has come where no scheduler can end them."""
        for request, reason, actor in self.admission.jobs.late(now):
            text = f"its time was over before its {'prompt was tokenized' if actor == 'tokenizer' else 'adapter was ready'}"
            self.fail(request, Fault(code=reason, message=text, actor=actor))
        # The scheduler ends what is late, unless there is none, or none that its streams reach: then nobody else would.
        for entry in [one for one in self.journal.entries.values() if (one.request.deadline or now) < now - OVERDUE_S]:
            self.handover.withdraw(entry)
            self.end(entry, "deadline", {})

    def end(self, entry: Entry, reason: str, facts: dict[str, Any]) -> None:
        """A stream has come to its end."""
        if entry.ended is not None or entry.request.over:
            return
        entry.ended = reason, facts
        self.handover.close(entry)
        entry.request.session.mark(entry)
        if entry.request.state != "open":
            self.admission.jobs.forget(entry.request)
            self.totals["finished"] += 1

    def fail(self, request: OpenRequest, fault: Fault) -> None:
        """The other kind of terminal: an error. Only the first one counts."""
        if request.over:
            return
        self.totals["failed"] += 1
        self.finish(request)
        if request.left is None:
            self._reception.answer(request.session, Failed(request.id, fault.to_wire()))

    def finish(self, request: OpenRequest) -> None:
        """A request is over, whatever it was doing, and nothing of it is kept."""
        self.admission.jobs.forget(request)
        for entry in request.entries:
            if entry.ended is None:
                self.handover.withdraw(entry)
        self._sessions.remove(request)
