"""The gateway: the one door. It admits, journals, hands over, and is the only one who tells a client that something ended."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Any

from penstock.actors.actor import ADAPTERS, HEARTBEAT_S, SCHEDULER, Actor, Peer, PeerKey
from penstock.actors.admission import Admission, Held
from penstock.actors.desk import Desk, State
from penstock.actors.errors import Fault, Refusal
from penstock.actors.handover import HandOver
from penstock.actors.jobs import Job
from penstock.actors.library import serves_adapters
from penstock.actors.messages import Begin, Drain, Encoded, Found, Journaled, Managed, Ready, Released, Vitals
from penstock.actors.orders import read_order
from penstock.actors.protocol import (
    Accepted,
    Adapters,
    Cancel,
    Control,
    Failed,
    Generate,
    Goodbye,
    List,
    Renew,
    Report,
    Status,
    Welcome,
)  # fmt: skip
from penstock.actors.reception import Reception
from penstock.actors.request import Entry, OpenRequest
from penstock.actors.resolve import Model
from penstock.actors.sessions import Session

LOOK_EVERY_S, LATEST_LOOK_S = 0.1, 1.0  # at leases and deadlines
OVERDUE_S = 0.5  # after its deadline a stream is ended without the scheduler
MOST_LOSSES = 3  # of a request's adapter
JOURNALED_EVERY = 8  # of the scheduler's messages: it may be several times as many ahead


class GatewayActor(Actor):
    kind = "gateway"

    def start(self) -> dict[str, Any]:
        self.reception = Reception(self.context, self.config, self.log, lambda message: self.desk.report(message))
        for socket in self.reception.door.sockets:
            self.mail.watch(socket)
        self.sessions = self.reception.sessions
        self.admission = Admission(self.config, self.post.incarnation)
        self.handover = HandOver(
            self.post.incarnation, lambda message: self.mail.send(SCHEDULER, message), isolate=self.config.isolate_prefixes
        )
        self.journal = self.handover.journal
        self.desk = Desk(self.config, self.post.incarnation, self.reception, lambda message: self.mail.send(ADAPTERS, message), self._state)
        self.model: Model | None = None
        self.opened = self.draining = False
        self.settled = 0.0  # when it is known who is there
        self.looked = 0.0  # when leases were judged last
        self.totals = {"requests": 0, "finished": 0, "failed": 0, "generated_tokens": 0, "prompt_tokens": 0, "chunks": 0}
        self.handlers |= {
            Encoded: self._answered, Found: self._answered, Released: self._released, Begin: self._begin, Drain: self._drain,
            Vitals: self.desk.keep_vitals, Managed: self.desk.managed,
        }  # fmt: skip
        self.awaits[Begin] = lambda begin: ((SCHEDULER, begin.incarnation),)
        self.calls: dict[type[Any], Callable[[Session, Any], None]] = {
            Generate: self._generate, Cancel: self._cancel, Renew: self._renew, List: self.desk.list, Status: self.desk.status,
            Control: self._control, Adapters: self.desk.adapters, Goodbye: lambda session, _: self._leave(session),
        }  # fmt: skip
        return {}

    def finish(self) -> None:
        if hasattr(self, "reception"):
            self.reception.close()

    # ── becoming ready ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def met(self, before: dict[PeerKey, Peer]) -> None:
        executor, tokenizer = self.peers.get(("executor", 0)), self.peers.get(("tokenizer", 0))
        if self.model is None and executor is not None and executor.ready and tokenizer is not None and tokenizer.ready:
            self.model = Model.from_facts(executor.facts, tokenizer.facts)
        for job in self.admission.jobs.reassign(self.peers):
            self._fail(job.request, Fault(code="engine_fault", message="the tokenizer died on this request", actor="tokenizer"))
        if self.peers.get(ADAPTERS) != before.get(ADAPTERS):
            self.desk.order_again()
        self._send_jobs()
        self._open()

    def _begin(self, message: Begin) -> None:
        guilty = self.handover.begin(message)
        if message.flying:
            self.log.warning("executor died in a step", streams=len(message.flying) // 8, on_trial=len(self.handover.suspects.trial))
        if guilty is not None:
            self.log.error("quarantined", request=guilty.request.id, client=guilty.request.session.client)
            text = "the executor died whenever this request was in its step, also when it was the only one there"
            self._fail(guilty.request, Fault(code="engine_fault", message=text, actor="executor", retryable=False))
        for entry in list(self.journal.entries.values()):
            self.handover.give(entry)
        self._open()

    def _open(self) -> None:
        if self.opened or self.model is None or not self.handover.scheduler:
            return
        self.opened = True
        first = self.config.tokenizers + self.config.detokenizers + 3 + serves_adapters(self.config)  # as many actors as there are
        if self.post.incarnation > first:
            self.settled = time.monotonic() + self.config.lease  # until then the clients of the gateway before this one may come back
        self.tell(Ready(self.kind, self.post.index, self.post.incarnation, {"open": True}))
        model, config = self.model, self.config
        facts = {"name": model.name, "digest": model.digest, "tokenizer": model.tokenizer, "vocab_size": model.vocab_size,
                 "max_model_len": model.max_model_len, "eos": model.eos}  # fmt: skip
        limits = {"message": config.max_message, "open": min(config.max_open, config.max_open_per_client)}
        self.reception.open(Welcome(f"{self.post.incarnation}", facts, limits, config.lease, config.window), time.monotonic())

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def after(self) -> None:
        now = time.monotonic()
        for session in self.reception.revoked(now):  # it hears nothing, not even why
            self.log.info("key revoked", user=session.user, client=session.client, requests=len(session.requests))
            self.totals["failed"] += sum(request.state != "told" for request in session.requests.values())
            self._leave(session)
        for session, message in self.reception.receive(now):
            self.progress += 1
            self.calls[type(message)](session, message)
        self._send_jobs()
        self._send_chunks()
        # A renewal may still be waiting at the door: leases are judged when everything there is read, or if there is always more.
        if now - self.looked >= (LATEST_LOOK_S if self.reception.busy else LOOK_EVERY_S):
            self.looked = now
            self._expire(now)
            settled = self.opened and now >= self.settled
            if self.draining and settled and not any(request.state != "told" for request in self.sessions.requests()):
                self.tell(Ready(self.kind, self.post.index, self.post.incarnation, {"drained": True}))

    def _expire(self, now: float) -> None:
        """End what nobody waits for any more: clients that were silent for a lease, requests whose client came back without asking for
        them, and whose deadline has come where no scheduler can end them."""
        lease = self.config.lease
        for session in self.sessions:
            if now - session.seen > lease:
                self.log.info("lease expired", client=session.client, requests=len(session.requests))
                for request in [request for request in session.requests.values() if request.state != "told"]:
                    text = f"nothing came from the client for {lease:g} s"
                    self._fail(request, Fault(code="lease_expired", message=text, limit=f"{lease:g} s"))
                self._leave(session)
                continue
            for request in [one for one in session.requests.values() if one.left is not None and now - one.left > lease]:
                self._finish(request)
        for request, reason, actor in self.admission.jobs.late(now):
            text = f"its time was over before its {'prompt was tokenized' if actor == 'tokenizer' else 'adapter was ready'}"
            self._fail(request, Fault(code=reason, message=text, actor=actor))
        # The scheduler ends what is late, unless there is none, or none that its streams reach: then nobody else would.
        for entry in [one for one in self.journal.entries.values() if (one.request.deadline or now) < now - OVERDUE_S]:
            self.handover.withdraw(entry)
            self._end(entry, "deadline", {})

    def _send_chunks(self) -> None:
        self.totals["chunks"] += self.reception.send_chunks(time.monotonic())

    def wake_in(self) -> float:
        return min(HEARTBEAT_S, self.config.lease / 2, LOOK_EVERY_S if self.draining or self.admission.jobs else HEARTBEAT_S)

    # ── what clients ask ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _generate(self, session: Session, message: Generate) -> None:
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
                self._finish(known)
            if self.model is None or (self.draining and message.resume is None):
                code = "draining" if self.draining else "unavailable"
                raise Refusal(code, "the engine takes no new requests now", retry_after=1.0)
            request = OpenRequest(message.request, session, now)
            held = Held(self.sessions.held(session), self.sessions.streams)
            job = self.admission.admit(request, message, self.model, self.journal, held, now)
        except Refusal as refusal:
            self.totals["failed"] += 1
            self.reception.answer(session, Failed(message.request, refusal.fault.to_wire()))
            return
        self.totals["requests"] += 1
        self.sessions.add(request)
        if job.complete:
            self._resolve(job)

    def _reattach(self, session: Session, request: OpenRequest, resume: dict[str, Any]) -> None:
        """A client is back on a new connection: go on where it says it is."""
        try:
            received = self.admission.received_ids(resume, len(request.entries))
            if not all(entry.rewind(ids) for entry, ids in zip(request.entries, received, strict=True)):
                raise Refusal("invalid_request", "the received ids are not those of this request", field="resume.received")
        except Refusal:
            self._finish(request)  # the error is its terminal
            raise
        self._attach(request)
        for entry in request.entries:
            session.mark(entry)

    def _cancel(self, session: Session, message: Cancel) -> None:
        for name in message.requests:
            request = session.requests.get(name) if isinstance(name, str) else None
            if request is None:
                continue
            if request.left is not None:  # of an earlier connection: nobody is told
                self._finish(request)
            elif request.state == "tokenizing":
                self._fail(request, Fault(code="not_found", message="cancelled before it began", retryable=False))
            for entry in request.entries:
                if entry.ended is None:
                    self.handover.withdraw(entry)
                    self._end(entry, "cancelled", {})

    def _renew(self, session: Session, message: Renew) -> None:
        for request in session.acknowledge(message.received):
            self._finish(request)

    def _control(self, session: Session, message: Control) -> None:
        try:
            order = read_order(message, session.user, session.user or session.name, self.config, self.desk.vitals)
        except Refusal as refusal:
            self.reception.answer(session, Report(message.query, {"error": refusal.fault.to_wire()}))
            return
        self.tell(order)
        self.draining = self.draining or order.order == "drain"  # at once, so that the answer says so
        self.desk.status(session, message)

    def _leave(self, session: Session) -> None:
        for request in list(session.requests.values()):
            self._finish(request)
        self.sessions.forget(session)

    # ── from tokenizing to the end ─────────────────────────────────────────────────────────────────────────────────────────────

    def _send_jobs(self) -> None:
        for key, message in self.admission.jobs.to_send(self.peers):
            self.mail.send(key, message)

    def _answered(self, message: Encoded | Found) -> None:
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
            self._fail(request, refusal.fault)
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
                self._end(entry, reason, {})
            else:
                self.handover.give(entry)

    def _attach(self, request: OpenRequest) -> None:
        """Number the streams of a request on its client's connection, and tell it."""
        session = request.session
        request.left = None
        for entry in request.entries:
            session.streams += 1
            entry.stream = session.streams
        self.reception.answer(session, Accepted(request.id, tuple(entry.stream for entry in request.entries), request.value.to_wire()))

    def _released(self, message: Released) -> None:
        taken = self.journal.take(message)
        self.totals["generated_tokens"] += taken.tokens
        for entry, reason, facts in taken.ends:
            if reason == "adapter_lost":
                self._find_again(entry)
            elif reason == "error":
                self._fail(entry.request, Fault(code=facts.get("code", "engine_fault"), message=facts.get("error", "")))
            else:
                self._end(entry, reason, facts)
        self.handover.mend(taken)
        if message.number % JOURNALED_EVERY == 0:
            self.mail.send(SCHEDULER, Journaled(message.index, message.number))
        self._send_chunks()  # at once, or the news of several steps would become one chunk

    def _find_again(self, entry: Entry) -> None:
        """Its adapter was not where it had been: somebody has tidied up, perhaps."""
        request, made = entry.request, sum(len(one.ids) for one in entry.request.entries)
        entry.unadapted = True
        if made > request.made:
            request.made, request.losses = made, 0
        request.losses += request.job is None
        if request.losses > MOST_LOSSES:
            text = "the adapter could not be loaded, although it was made ready again: see the executor's log"
            self._fail(request, Fault(code="adapter_error", message=text, field="adapter", actor="executor"))
            return
        self.admission.find_again(request)

    def _end(self, entry: Entry, reason: str, facts: dict[str, Any]) -> None:
        """A stream has come to its end."""
        if entry.ended is not None or entry.request.over:
            return
        entry.ended = reason, facts
        self.handover.close(entry)
        entry.request.session.mark(entry)
        if entry.request.state != "open":
            self.admission.jobs.forget(entry.request)
            self.totals["finished"] += 1

    def _fail(self, request: OpenRequest, fault: Fault) -> None:
        """The other kind of terminal: an error. Only the first one counts."""
        if request.over:
            return
        self.totals["failed"] += 1
        self._finish(request)
        if request.left is None:
            self.reception.answer(request.session, Failed(request.id, fault.to_wire()))

    def _finish(self, request: OpenRequest) -> None:
        """A request is over, whatever it was doing, and nothing of it is kept."""
        self.admission.jobs.forget(request)
        for entry in request.entries:
            if entry.ended is None:
                self.handover.withdraw(entry)
        self.sessions.remove(request)

    # ── the rest ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _drain(self, _: Drain) -> None:
        self.draining = True

    def _state(self) -> State:
        requests = {entry.request for entry in self.journal.entries.values()} | {job.request for job in self.admission.jobs}
        counts = {**self.totals, "failed": self.totals["failed"] + self.reception.turned_away, "hand_overs": self.handover.again}
        name = "draining" if self.draining else "ready" if self.opened else "starting"
        return State(name, self.model, counts | {"open": len(requests)})

    def load(self) -> dict[str, Any]:
        return {"clients": len(self.sessions), "open": len(self.journal.entries)}
