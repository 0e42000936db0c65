"""The gateway: the one door. It admits, journals, hands over, and is the only one who tells a client that something ended.

The one function that everything hangs on is `hand_over`: it raises a stream's attempt, then reads the journal, and gives the value to
the scheduler. The first submission, a restarted executor, a lost row and a resumed client are all the same call. A row that comes back
counts only if its attempt is current and its offset equals the journal's length; a later offset is a gap, and hands over again.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from penstock.actors.actor import HEARTBEAT_S, SCHEDULER, Actor, Peer, PeerKey
from penstock.actors.admission import Admission, Held
from penstock.actors.columns import int64, sampler_to_wire
from penstock.actors.door import BATCH as DOOR_BATCH
from penstock.actors.door import ROUTING_ID, Arrival, Door
from penstock.actors.errors import Fault, Refusal
from penstock.actors.journal import Entry, Journal, OpenRequest
from penstock.actors.messages import (
    Abort,
    Accepted,
    Begin,
    Cancel,
    Drain,
    Encoded,
    Failed,
    Generate,
    Goodbye,
    Hello,
    Journaled,
    List,
    Listing,
    Ready,
    Released,
    Renew,
    Report,
    Status,
    Submit,
    Vitals,
    Welcome,
)
from penstock.actors.meter import Meter
from penstock.actors.resolve import Model, Resolved
from penstock.actors.sessions import Session, Sessions
from penstock.actors.status import list_requests, status_report
from penstock.actors.suspects import Suspects
from penstock.actors.wire import WireError

LOOK_EVERY_S = 0.1  # at leases and deadlines
OVERDUE_S = 0.5  # after its deadline a stream is ended without the scheduler
MOST_SESSIONS = 16_384
MOST_SESSIONS_OF_USER = 1024
UNREAD = 4  # times the largest message: answers that a client may leave unread, in bytes
TELL_EVERY_S = 10.0  # of connections that were refused: strangers must not fill the disk
STRANGERS = (10.0, 2.0**20)  # messages and bytes a second of a connection that was not welcomed
JOURNALED_EVERY = 8  # of the scheduler's messages: it may be several times as many ahead


class GatewayActor(Actor):
    kind = "gateway"

    def start(self) -> dict[str, Any]:
        self.door = Door(self.context, self.config)
        for socket in self.door.sockets:
            self.mail.watch(socket)
        self.sessions = Sessions()
        self.meter = Meter(self.config.message_rate, self.config.byte_rate, 2 * MOST_SESSIONS)
        self.strangers = Meter(*STRANGERS, MOST_SESSIONS)
        self.journal = Journal(self.post.incarnation)
        self.suspects: Suspects[Entry] = Suspects()
        self.admission = Admission(self.config)
        self.model: Model | None = None
        self.scheduler = 0  # incarnation that said Begin
        self.hellos: dict[tuple[str, str], tuple[Arrival, Hello]] = {}  # clients that came before the engine was ready
        self.draining = False
        self.looked = 0.0  # when leases were judged last
        self.refused, self.told_refused = 0, 0.0  # connections, as the log has it, and since when
        self.kept = 0  # streams of all clients, ended ones that they have not acknowledged included, as of then
        self.salt_key = secrets.token_bytes(32)  # what it is changes no token: it only has to be the same for all requests
        self.opened = False
        self.vitals: tuple[Any, ...] = ()
        self.totals = {"requests": 0, "finished": 0, "failed": 0, "generated_tokens": 0, "prompt_tokens": 0, "chunks": 0, "hand_overs": 0}
        self.handlers |= {
            Encoded: self._encoded, Released: self._released, Begin: self._begin, Drain: self._drain, Vitals: self._keep_vitals,
        }  # fmt: skip
        self.calls: dict[type[Any], Callable[[Session, Any], None]] = {
            Generate: self._generate, Cancel: self._cancel, Renew: lambda session, message: session.acknowledge(message.received),
            List: self._list, Status: lambda session, message: self._answer(session, self._report(message)),
            Goodbye: lambda session, _: self._leave(session),
        }  # fmt: skip
        return {}

    def finish(self) -> None:
        if hasattr(self, "door"):
            self.door.close()

    # ── becoming ready ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def met(self, before: dict[PeerKey, Peer]) -> None:
        executor, tokenizer = self.peers.get(("executor", 0)), self.peers.get(("tokenizer", 0))
        if self.model is None and executor is not None and executor.ready and tokenizer is not None and tokenizer.ready:
            self.model = Model.from_facts(executor.facts, tokenizer.facts)
        for job in self.admission.reassign(self.peers):
            self._fail(job.request, Fault(code="engine_fault", message="the tokenizer died on this request", actor="tokenizer"))
        self._send_encodes()
        self._open()

    def _begin(self, message: Begin) -> None:
        self.scheduler = message.incarnation
        flying = [entry for handle in int64(message.flying).tolist() if (entry := self.journal.entries.get(handle)) is not None]
        if flying:
            self._judge(flying)
        for entry in list(self.journal.entries.values()):
            self.hand_over(entry)
        self._open()

    def _judge(self, flying: list[Entry]) -> None:
        """An executor died with these streams in a step: the guilty one ends, and suspects may have to wait."""
        guilty = self.suspects.crashed((entry, len(entry.ids)) for entry in flying)
        self.log.warning("executor died in a step", streams=len(flying), on_trial=len(self.suspects.trial))
        if guilty is not None:
            self.log.error("quarantined", request=guilty.request.id, client=guilty.request.session.client)
            text = "the executor died whenever this request was in its step, also when it was the only one there"
            self._fail(guilty.request, Fault(code="engine_fault", message=text, actor="executor", retryable=False))

    def _acquit(self) -> None:
        """Streams on trial that had a token since are cleared; when all are, the next of those held back are tried."""
        for entry in self.suspects.cleared(lambda entry: len(entry.ids)):
            self.hand_over(entry)

    def _open(self) -> None:
        if self.opened or self.model is None or not self.scheduler:
            return
        self.opened = True
        self.tell(Ready(self.kind, self.post.index, self.post.incarnation, {"open": True}))
        now = time.monotonic()
        for (user, _), (arrival, hello) in self.hellos.items():
            if self.door.users.get(arrival.key) == user:
                self._welcome(arrival, user, hello, now)
        self.hellos.clear()

    # ── the door ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def after(self) -> None:
        now, taken = time.monotonic(), 0
        if self.door.look(now):
            self._revoke()
        if self.door.refused > self.refused and now - self.told_refused >= TELL_EVERY_S:
            self.refused, self.told_refused = self.door.refused, now
            self.log.warning("connections without a known key were refused", so_far=self.refused)
        for arrival in self.door.receive():
            taken += 1
            self._call(arrival, now)
        self.progress += taken
        self._send_encodes()
        self._send_chunks()
        # A renewal may still be waiting at the door: leases are judged only when everything there is read.
        if taken < DOOR_BATCH and now - self.looked >= LOOK_EVERY_S:
            self.looked = now
            self._expire(now)
            untold = any(request.told is None for session in self.sessions for request in session.requests.values())
            if self.draining and not untold:
                self.tell(Ready(self.kind, self.post.index, self.post.incarnation, {"drained": True}))

    def _revoke(self) -> None:
        """The keys changed. Who is not named any more loses at once what is open: it hears nothing, not even why."""
        self.log.info("keys read", users=len(self.door.users), unreadable=self.door.unreadable)
        for session in self.sessions:
            if self.door.users.get(session.key) != session.user:
                self.log.info("key revoked", user=session.user, client=session.client, requests=len(session.requests))
                self.totals["failed"] += sum(request.told is None for request in session.requests.values())
                self._leave(session)

    def _expire(self, now: float) -> None:
        """End what nobody waits for any more: clients that were silent for a lease, requests whose client came back without asking for
        them, and whose deadline has come where no scheduler can end them."""
        lease = self.config.lease
        for session in self.sessions:
            if now - session.seen > lease:
                self.log.info("lease expired", client=session.client, requests=len(session.requests))
                for request in [request for request in session.requests.values() if request.told is None]:
                    text = f"nothing came from the client for {lease:g} s"
                    self._fail(request, Fault(code="lease_expired", message=text, limit=f"{lease:g} s"))
                self._leave(session)
                continue
            for request in [one for one in session.requests.values() if one.left is not None and now - one.left > lease]:
                self._drop(request)
        self.kept = sum(request.streams for session in self.sessions for request in session.requests.values())
        for request, reason in self.admission.late(now):
            self._fail(request, Fault(code=reason, message="its time was over before its prompt was tokenized", actor="tokenizer"))
        # The scheduler ends what is late, unless there is none, or none that its streams reach: then nobody else would.
        for entry in [one for one in self.journal.entries.values() if (one.request.deadline or now) < now - OVERDUE_S]:
            self._abort(entry)
            self._end(entry, "deadline", {})

    def _send_chunks(self) -> None:
        now = time.monotonic()
        for session in self.sessions.with_news():
            if session.may_send(self.config.window):
                self.totals["chunks"] += 1
                self.door.send(session.identity, session.chunks(now))

    def wake_in(self) -> float:
        return min(HEARTBEAT_S, self.config.lease / 2, LOOK_EVERY_S if self.draining or self.admission.jobs else HEARTBEAT_S)

    def _call(self, arrival: Arrival, now: float) -> None:
        identity, user = arrival.identity, self.door.users.get(arrival.key)
        session = self.sessions.find(identity)
        if user is None or (session is not None and session.user != user):
            return  # its key was revoked, or it took the place of another's connection
        meter = self.strangers if session is None else self.meter
        verdict = meter.judge(identity, arrival.size, now)
        if session is not None:
            session.seen = now
        if verdict == "far too much" and arrival.size <= self.config.max_message:  # else it is told that, whoever it is
            if meter.warn(identity):
                self.door.send(identity, Failed(None, _too_much(meter.turn(identity))))
            return
        try:
            message = self.door.decode(arrival.frame)
            if isinstance(message, Hello):
                self._hello(arrival, user, message, now)
            elif session is None and isinstance(message, Status):  # for anyone, also while the engine is starting
                self.door.send(identity, self._report(message))
            elif session is None:
                self.door.send(identity, Goodbye())
            elif isinstance(message, Generate) and (not self._reads(session, now) or verdict == "too much"):
                self.totals["failed"] += 1
                self._answer(session, Failed(message.request, _too_much(meter.turn(identity))))
            elif not isinstance(message, List | Status) or self._reads(session, now):
                self.calls[type(message)](session, message)
        except WireError as error:
            self.door.send(identity, Failed(None, Fault(code=error.code, message=str(error)).to_wire()))

    def _answer(self, session: Session, message: Any) -> None:
        session.answered += self.door.send(session.identity, message)

    def _reads(self, session: Session, now: float) -> bool:
        """Whether a client reads its answers. If many wait and no chunks are on their way, as many empty ones follow as it must
        acknowledge at once; who does not is told nothing more."""
        most = UNREAD * self.config.max_message
        if session.unread > most // 2 and session.number == session.acknowledged:
            for _ in range(max(1, self.config.window // 4)):
                self.door.send(session.identity, session.chunks(now))
        return session.unread <= most

    def _hello(self, arrival: Arrival, user: str, hello: Hello, now: float) -> None:
        if not 0 < len(hello.client) <= 64 or len(hello.name) > 256:
            raise WireError("malformed", "Hello.client must have 1 to 64 characters, Hello.name at most 256")
        if not self.door.fits(arrival.identity):
            raise WireError("malformed", f"with a key, a connection must set a routing id of {ROUTING_ID} or more random bytes")
        known = hello.client in self.sessions.of(user) or (user, hello.client) in self.hellos
        every = len(self.sessions) + len(self.hellos)
        mine = len(self.sessions.of(user)) + sum(owner == user for owner, _ in self.hellos) if user else 0
        if not known and (every >= MOST_SESSIONS or mine >= MOST_SESSIONS_OF_USER):
            text = f"{every} clients are connected" + (f", {mine} of them {user}'s" if user else "")
            limit = f"{MOST_SESSIONS} clients, {MOST_SESSIONS_OF_USER} of one user"
            fault = Fault(code="overloaded", message=text, limit=limit, retry_after=self.config.lease)
            self.door.send(arrival.identity, Failed(None, fault.to_wire()))
        elif self.opened:
            self._welcome(arrival, user, hello, now)
        else:
            self.hellos[user, hello.client] = replace(arrival, frame=b""), hello

    def _welcome(self, arrival: Arrival, user: str, hello: Hello, now: float) -> None:
        identity = arrival.identity
        before = self.sessions.find(identity)
        if before is not None and before.client != hello.client:
            self._leave(before)  # one client a connection
        self.sessions.meet(hello.client, hello.name, identity, now, user, arrival.key)
        limits = {"message": self.config.max_message, "open": min(self.config.max_open, self.config.max_open_per_client)}
        model = self.model
        facts = {"name": model.name, "digest": model.digest, "tokenizer": model.tokenizer, "vocab_size": model.vocab_size,
                 "max_model_len": model.max_model_len, "eos": model.eos} if model is not None else {}  # fmt: skip
        self.door.send(identity, Welcome(f"{self.post.incarnation}", facts, limits, self.config.lease, self.config.window))

    def _leave(self, session: Session) -> None:
        for request in list(session.requests.values()):
            self._drop(request)
        self.sessions.forget(session)

    # ── requests ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _generate(self, session: Session, message: Generate) -> None:
        now = time.monotonic()
        try:
            known = session.requests.get(message.request)
            if known is not None and not known.attached:
                if message.resume is not None and known.entries:
                    self._reattach(session, known, message.resume)
                    return
                self._drop(known)  # said again on a new connection, without its answer: it begins anew
            elif known is not None and known.told is None:
                raise Refusal(
                    "duplicate_request", f"the client has an open request {message.request!r}", field="request", value=message.request[:120]
                )
            if self.model is None or self.draining:
                code = "draining" if self.draining else "unavailable"
                raise Refusal(code, "the engine takes no new requests now", retry_after=1.0)
            request = OpenRequest(message.request, session, now)
            held = Held(self.sessions.held(session), self.kept)
            job = self.admission.admit(request, message, self.model, self.journal, held, now)
        except Refusal as refusal:
            self.totals["failed"] += 1
            self._answer(session, Failed(message.request, refusal.fault.to_wire()))
            return
        self.totals["requests"] += 1
        session.requests[request.id] = request
        self.kept += request.streams
        if job is None:
            self._accept(request)

    def _send_encodes(self) -> None:
        for index, encode in self.admission.to_send(self.peers):
            self.mail.send(("tokenizer", index), encode)

    def _encoded(self, message: Encoded) -> None:
        job = self.admission.done(message.job)
        if job is None or job.request.session.requests.get(job.request.id) is not job.request or self.model is None:
            return  # cancelled meanwhile
        try:
            self.admission.resolve(job, message, self.model, self.journal)
        except Refusal as refusal:
            self._fail(job.request, refusal.fault)
            return
        self._accept(job.request)

    def _accept(self, request: OpenRequest) -> None:
        """The request is resolved: journal it, tell its client, hand it over."""
        resolved = request.resolved
        if resolved is None or self.model is None:
            raise RuntimeError("accepted before it was resolved")
        request.tokenized = time.monotonic()
        received = self.admission.received.pop(request, None) or [array("i") for _ in range(resolved.params.n)]
        request.entries = [self.journal.open(request, child, ids) for child, ids in enumerate(received)]
        self.totals["prompt_tokens"] += resolved.prompt_tokens
        if request.attached:  # else its client has another connection by now, and will ask
            self._attach(request)
        for entry in request.entries:
            reason = _complete(entry, resolved, self.model)
            if reason is not None:
                self._end(entry, reason, {})
            elif self.scheduler:
                self.hand_over(entry)

    def _attach(self, request: OpenRequest) -> None:
        """Number the streams of a request on its client's connection, and tell it."""
        session = request.session
        request.attached, request.left = True, None
        for entry in request.entries:
            session.streams += 1
            entry.stream = session.streams
        resolved = request.resolved.to_wire() if request.resolved is not None else {}
        self._answer(session, Accepted(request.id, tuple(entry.stream for entry in request.entries), resolved))

    def _reattach(self, session: Session, request: OpenRequest, resume: dict[str, Any]) -> None:
        """A client is back on a new connection: go on where it says it is."""
        try:
            received = self.admission.received_ids(resume, len(request.entries))
            if not all(entry.rewind(ids) for entry, ids in zip(request.entries, received, strict=True)):
                raise Refusal("invalid_request", "the received ids are not those of this request", field="resume.received")
        except Refusal:
            self._drop(request)  # the error is its terminal
            raise
        self._attach(request)
        for entry in request.entries:
            session.mark(entry)

    def hand_over(self, entry: Entry) -> None:
        """Give a stream's value to the scheduler, as it stands in the journal. Rows of earlier attempts no longer count."""
        if entry.handle not in self.journal.entries:
            return  # it ended while others of the same message were handled
        if self.suspects.holds(entry):
            return
        entry.attempt += 1
        resolved = entry.request.resolved
        if resolved is None or self.model is None:
            raise RuntimeError("handed over before it was resolved")
        params = resolved.params
        decode = {"stop": params.stop, "skip_special_tokens": params.skip_special_tokens}
        if params.echo:
            decode["echo"] = entry.base == 0 and not entry.counts
        self.totals["hand_overs"] += entry.attempt > 1
        self.mail.send(
            SCHEDULER,
            Submit(
                entry.handle, entry.attempt, resolved.prompt, entry.ids.tobytes(), resolved.limit,
                sampler_to_wire(resolved.sampler(entry.child, self.model.eos)), decode, resolved.priority, resolved.tenant,
                self._salt(resolved.tenant),
                entry.request.deadline, entry.request.queue_timeout if not entry.ids else None,
            ),
        )  # fmt: skip

    def _salt(self, tenant: str) -> bytes:
        """Requests of equal salts share cached prefixes."""
        if not self.config.isolate_prefixes:
            return b""
        return blake2b(tenant.encode(errors="surrogatepass"), key=self.salt_key, digest_size=16, person=b"penstock-salt").digest()

    def _cancel(self, session: Session, message: Cancel) -> None:
        for name in message.requests:
            request = session.requests.get(name) if isinstance(name, str) else None
            if request is None:
                continue
            if not request.attached:  # of an earlier connection: nobody is told
                self._drop(request)
            elif not request.entries:  # still being tokenized
                self.admission.forget(request)
                self._fail(request, Fault(code="not_found", message="cancelled before it began", retryable=False))
            for entry in request.entries if request.attached else ():
                if entry.ended is None:
                    self._abort(entry)
                    self._end(entry, "cancelled", {})

    # ── what comes back ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _released(self, message: Released) -> None:
        taken = self.journal.take(message)
        self.totals["generated_tokens"] += taken.tokens
        for entry, reason, facts in taken.ends:
            if reason == "error":
                self._fail(entry.request, Fault(code=facts.get("code", "engine_fault"), message=facts.get("error", "")))
            else:
                self._end(entry, reason, facts)
        for entry in taken.gaps:
            self.hand_over(entry)
        if self.suspects.trial:
            self._acquit()
        if message.number % JOURNALED_EVERY == 0:
            self.mail.send(SCHEDULER, Journaled(message.index, message.number))
        self._send_chunks()  # at once, or the news of several steps would become one chunk

    def _end(self, entry: Entry, reason: str, facts: dict[str, Any]) -> None:
        if entry.handle not in self.journal.entries:
            return  # its request has failed already
        entry.ended = reason, facts
        self._close(entry)
        entry.request.session.mark(entry)
        if entry.request.ended:
            self.totals["finished"] += 1

    def _fail(self, request: OpenRequest, fault: Fault) -> None:
        """The other kind of terminal: an error. Only the first one counts."""
        session = request.session
        if session.requests.get(request.id) is not request:
            return
        self.totals["failed"] += 1
        self._drop(request)
        if request.attached:
            self._answer(session, Failed(request.id, fault.to_wire()))

    def _drop(self, request: OpenRequest) -> None:
        """Forget a request, whatever it is doing."""
        self.admission.forget(request)
        for entry in request.entries:
            if entry.ended is None:
                self._abort(entry)
                self._close(entry)
            request.session.dirty.pop(entry.handle, None)
        if request.session.requests.get(request.id) is request:
            del request.session.requests[request.id]

    def _close(self, entry: Entry) -> None:
        self.journal.close(entry)
        for other in self.suspects.forget(entry):
            self.hand_over(other)

    def _abort(self, entry: Entry) -> None:
        self.mail.send(SCHEDULER, Abort(array("q", [entry.handle]).tobytes()))

    # ── the rest ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _drain(self, _: Drain) -> None:
        self.draining = True

    def _keep_vitals(self, message: Vitals) -> None:
        self.vitals = message.actors

    def _list(self, session: Session, message: List) -> None:
        self._answer(session, Listing(message.query, tuple(list_requests(session, time.monotonic()))))

    def _report(self, message: Status) -> Report:
        state = "draining" if self.draining else "ready" if self.opened else "starting"
        counts = {"open": len({entry.request for entry in self.journal.entries.values()}) + len(self.admission.jobs), **self.totals}
        return Report(message.query, status_report(state, self.model, counts, len(self.sessions), self.vitals))

    def load(self) -> dict[str, Any]:
        return {"clients": len(self.sessions), "open": len(self.journal.entries)}


def _too_much(wait: float) -> dict[str, Any]:
    text = "the connection sends more, or reads less, than this engine takes from one"
    return Fault(code="overloaded", message=text, limit="message_rate, byte_rate", retry_after=max(0.1, wait)).to_wire()


def _complete(entry: Entry, resolved: Resolved, model: Model) -> str | None:
    """Why a stream that a client brought along is at its end already, if it is."""
    if len(entry.ids) >= resolved.limit:
        return "length"
    if entry.ids and entry.ids[-1] in resolved.sampler(entry.child, model.eos).stop_ids:
        return "stop"
    return None
