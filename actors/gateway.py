"""The gateway: the one door. It admits, journals, hands over, and is the only one who tells a client that something ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from penstock.actors.actor import ADAPTERS, HEARTBEAT_S, SCHEDULER, Actor, Peer, PeerKey
from penstock.actors.desk import Desk, State
from penstock.actors.errors import Fault, Refusal
from penstock.actors.library import serves_adapters
from penstock.actors.messages import Begin, Drain, Encoded, Found, Managed, Ready, Released, Vitals
from penstock.actors.orders import read_order
from penstock.actors.protocol import Adapters, Cancel, Control, Generate, Goodbye, List, Renew, Report, Status, Welcome
from penstock.actors.reception import Reception
from penstock.actors.requests import Requests
from penstock.actors.resolve import Model
from penstock.actors.sessions import Session

LOOK_EVERY_S, LATEST_LOOK_S = 0.1, 1.0  # at leases and deadlines


class GatewayActor(Actor):
    kind = "gateway"

    def start(self) -> dict[str, Any]:
        self.reception = Reception(self.context, self.config, self.log, lambda message: self.desk.report(message))
        for socket in self.reception.door.sockets:
            self.mail.watch(socket)
        self.sessions = self.reception.sessions
        self.requests = Requests(self.config, self.post.incarnation, self.reception, self.mail.send)
        self.desk = Desk(self.config, self.post.incarnation, self.reception, lambda message: self.mail.send(ADAPTERS, message), self._state)
        self.opened = False
        self.settled = 0.0  # when it is known who is there
        self.looked = 0.0  # when leases were judged last
        self.chunks = 0
        self.handlers |= {
            Encoded: self.requests.answered, Found: self.requests.answered, Released: self._released, Begin: self._begin,
            Drain: self._drain, Vitals: self.desk.keep_vitals, Managed: self.desk.managed,
        }  # fmt: skip
        self.awaits[Begin] = lambda begin: ((SCHEDULER, begin.incarnation),)
        self.calls: dict[type[Any], Callable[[Session, Any], None]] = {
            Generate: self.requests.generate, Cancel: self.requests.cancel, Renew: self._renew, List: self.desk.list,
            Status: self.desk.status, Control: self._control, Adapters: self.desk.adapters,
            Goodbye: lambda session, _: self._leave(session),
        }  # fmt: skip
        return {}

    def finish(self) -> None:
        if hasattr(self, "reception"):
            self.reception.close()

    # ── becoming ready ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def met(self, before: dict[PeerKey, Peer]) -> None:
        executor, tokenizer = self.peers.get(("executor", 0)), self.peers.get(("tokenizer", 0))
        if self.requests.model is None and executor is not None and executor.ready and tokenizer is not None and tokenizer.ready:
            self.requests.model = Model.from_facts(executor.facts, tokenizer.facts)
        self.requests.reassign(self.peers)
        if self.peers.get(ADAPTERS) != before.get(ADAPTERS):
            self.desk.order_again()
        self.requests.send_jobs(self.peers)
        self._open()

    def _begin(self, message: Begin) -> None:
        guilty = self.requests.begin(message)
        if message.flying:
            trial = len(self.requests.handover.suspects.trial)
            self.log.warning("executor died in a step", streams=len(message.flying) // 8, on_trial=trial)
        if guilty is not None:
            self.log.error("quarantined", request=guilty.id, client=guilty.session.client)
        self._open()

    def _open(self) -> None:
        model, config = self.requests.model, self.config
        if self.opened or model is None or not self.requests.handover.scheduler:
            return
        self.opened = True
        first = config.tokenizers + config.detokenizers + 3 + serves_adapters(config)  # as many actors as there are
        if self.post.incarnation > first:
            self.settled = time.monotonic() + config.lease  # until then the clients of the gateway before this one may come back
        self.tell(Ready(self.kind, self.post.index, self.post.incarnation, {"open": True}))
        facts = {"name": model.name, "digest": model.digest, "tokenizer": model.tokenizer, "vocab_size": model.vocab_size,
                 "max_model_len": model.max_model_len, "eos": model.eos}  # fmt: skip
        limits = {"message": config.max_message, "open": min(config.max_open, config.max_open_per_client)}
        self.reception.open(Welcome(f"{self.post.incarnation}", facts, limits, config.lease, config.window), time.monotonic())

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def after(self) -> None:
        now = time.monotonic()
        for session in self.reception.revoked(now):  # it hears nothing, not even why
            self.log.info("key revoked", user=session.user, client=session.client, requests=len(session.requests))
            self.requests.totals["failed"] += sum(request.state != "told" for request in session.requests.values())
            self._leave(session)
        for session, message in self.reception.receive(now):
            self.progress += 1
            self.calls[type(message)](session, message)
        self.requests.send_jobs(self.peers)
        self._send_chunks()
        # A renewal may still be waiting at the door: leases are judged when everything there is read, or if there is always more.
        if now - self.looked >= (LATEST_LOOK_S if self.reception.busy else LOOK_EVERY_S):
            self.looked = now
            self._expire(now)
            self.requests.expire(now)
            settled = self.opened and now >= self.settled
            if self.requests.draining and settled and not any(request.state != "told" for request in self.sessions.requests()):
                self.tell(Ready(self.kind, self.post.index, self.post.incarnation, {"drained": True}))

    def _expire(self, now: float) -> None:
        """End what nobody waits for any more: clients that were silent for a lease, and requests whose client came back without asking
        for them."""
        lease = self.config.lease
        for session in self.sessions:
            if now - session.seen > lease:
                self.log.info("lease expired", client=session.client, requests=len(session.requests))
                for request in [request for request in session.requests.values() if request.state != "told"]:
                    text = f"nothing came from the client for {lease:g} s"
                    self.requests.fail(request, Fault(code="lease_expired", message=text, limit=f"{lease:g} s"))
                self._leave(session)
                continue
            for request in [one for one in session.requests.values() if one.left is not None and now - one.left > lease]:
                self.requests.finish(request)

    def _send_chunks(self) -> None:
        self.chunks += self.reception.send_chunks(time.monotonic())

    def _released(self, message: Released) -> None:
        self.requests.released(message)
        self._send_chunks()  # at once, or the news of several steps would become one chunk

    def wake_in(self) -> float:
        soon = self.requests.draining or self.requests.admission.jobs
        return min(HEARTBEAT_S, self.config.lease / 2, LOOK_EVERY_S if soon else HEARTBEAT_S)

    # ── what clients ask ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _renew(self, session: Session, message: Renew) -> None:
        for request in session.acknowledge(message.received):
            self.requests.finish(request)

    def _control(self, session: Session, message: Control) -> None:
        try:
            order = read_order(message, session.user, session.user or session.name, self.config, self.desk.vitals)
        except Refusal as refusal:
            self.reception.answer(session, Report(message.query, {"error": refusal.fault.to_wire()}))
            return
        self.tell(order)
        self.requests.draining = self.requests.draining or order.order == "drain"  # at once, so that the answer says so
        self.desk.status(session, message)

    def _leave(self, session: Session) -> None:
        for request in list(session.requests.values()):
            self.requests.finish(request)
        self.sessions.forget(session)

    # ── the rest ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _drain(self, _: Drain) -> None:
        self.requests.draining = True

    def _state(self) -> State:
        requests, totals = self.requests, self.requests.totals
        counts = {
            **totals, "failed": totals["failed"] + self.reception.turned_away, "chunks": self.chunks, "hand_overs": requests.handover.again,
            "open": len(requests.open),
        }  # fmt: skip
        return State("draining" if requests.draining else "ready" if self.opened else "starting", requests.model, counts)

    def load(self) -> dict[str, Any]:
        return {"clients": len(self.sessions), "open": len(self.requests.journal.entries)}
