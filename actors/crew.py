"""The crew: every actor of an engine, hired, watched, and replaced when it dies or stalls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import zmq

from penstock.actors.actor import EXECUTOR, HEARTBEAT_S, PeerKey, Post
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault
from penstock.actors.forkserver import ForkServer
from penstock.actors.library import serves_adapters
from penstock.actors.log import Log
from penstock.actors.mailbox import Mailbox
from penstock.actors.messages import Died, Heartbeat, Order, Peers, Ready, Stop, Up
from penstock.actors.worker import ProcessWorker, ThreadWorker, Worker
from penstock.actors.workplace import Workplace

BACKOFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)  # before the nth start in a row of an actor that never was ready; beyond these the engine gives up
STOP_S = 5.0  # that an actor has to end in order
USUAL = 4  # times the longest start of its kind: what another one may take
LEAST_BUDGET = 64  # tokens in a step, however often memory runs out


class Crew:
    """Belongs to the supervisor, whose mail, at `address`, it uses. `door` is where clients connect."""

    def __init__(
        self, config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]], workplace: Workplace, mail: Mailbox, address: str, door: str,
        log: Log,
    ) -> None:  # fmt: skip
        self.config = config
        self.mail = mail
        self.log = log
        self.workers: dict[PeerKey, Worker] = {}
        self.started = False  # the engine was ready once: from then on, who dies is replaced
        self.failure: Fault | None = None  # set: there is no point in going on
        self._context, self._workplace = context, workplace
        self._address, self._door = address, door
        self._scheme = address.partition("://")[0] + "://"
        self._forks: ForkServer | None = None  # none with threads
        self._barren = 0  # fork servers in a row that died before they had forked anything
        self._incarnations = 0
        self._token_budget = config.token_budget
        self._usual: dict[str, float] = {}  # kind → seconds that its longest start took
        self._starved, self._count_at = starved_processes(), 0.0

    # ── starting ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def hire_all(self) -> None:
        if self.config.placement == "processes":
            self._open_forks()
        counts = {  # the executor last: what it needs takes long to import, and the others are forked before
            "tokenizer": self.config.tokenizers, "detokenizer": self.config.detokenizers, "scheduler": 1, "gateway": 1,
            "adapters": int(serves_adapters(self.config)), "executor": 1,
        }  # fmt: skip
        for kind, count in counts.items():
            for index in range(count):
                self._hire((kind, index))

    def _hire(self, key: PeerKey) -> None:
        self._incarnations += 1
        kind, index = key
        config = self.config.to_wire() | {"address": self._door, "token_budget": self._token_budget}
        post = Post(
            kind, index, self._incarnations, self._workplace.address(self._scheme, f"{kind}{index}.{self._incarnations}"), self._address,
            str(self._workplace.path), EngineConfig.from_wire(config),
        )  # fmt: skip
        before = self.workers.get(key)
        worker: Worker = ThreadWorker(post, self._context) if self._forks is None else ProcessWorker(post, self._forks)
        if before is not None:
            # One that was never born has ended nothing: who was to relieve somebody still is.
            worker.failed_starts, worker.relieves = before.failed_starts, before.blameless if before.pid else before.relieves
        self.workers[key] = worker

    def _open_forks(self) -> None:
        self._forks = ForkServer()
        self.mail.watch(self._forks.control.fileno())

    def _births(self, forks: ForkServer, now: float) -> None:
        """Take in what the fork server made. If it died, or makes nothing, another is asked for what this one was asked."""
        by_incarnation = {worker.post.incarnation: worker for worker in self.workers.values() if isinstance(worker, ProcessWorker)}
        while (news := forks.born()) is not None:
            worker = by_incarnation.get(news[0])
            if worker is not None:
                self._born(worker, news[1])
                self._barren = 0
        still = forks.stalled(now, self.config.stall_timeout, self.config.start_timeout)
        if still is not None or forks.gone():
            self.log.error("the fork server died" if still is None else "the fork server stalled", seconds=still)
            self.mail.unwatch(forks.control.fileno())
            forks.close()
            self._barren += 1
            if self._barren >= len(BACKOFF_S):
                self.failure = Fault(code="start_error", message="the fork server cannot run: see its error output")
                return
            self._open_forks()
            for worker in by_incarnation.values():
                if not worker.pid:
                    worker.close()  # should it have been born after all, that ends it
                    self._hire((worker.post.kind, worker.post.index))

    def _born(self, worker: ProcessWorker, pid: int) -> None:
        """Both the fork server and the actor tell its process id, and either may be the first."""
        if not worker.pid:
            self.mail.watch(worker.born(pid))

    # ── while it runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def sender(self, message: Up | Ready | Heartbeat | Died) -> Worker | None:
        """Who sent this, unless it has been replaced since."""
        worker = self.workers.get((message.kind, message.index))
        return worker if worker is not None and worker.post.incarnation == message.incarnation else None

    def listens(self, worker: Worker, address: str, pid: int) -> None:
        """An actor is up: it can be told things."""
        if isinstance(worker, ProcessWorker):
            self._born(worker, pid)
        worker.up = True
        self.mail.connect((worker.post.kind, worker.post.index), address)
        self.announce()

    def begin(self, worker: Worker, facts: dict[str, Any], now: float) -> None:
        """An actor is ready."""
        self._usual[worker.post.kind] = max(now - worker.begun, self._usual.get(worker.post.kind, 0.0))
        worker.begin(facts, now)
        self.announce()

    def announce(self) -> None:
        """Tell everyone who is there."""
        everyone = Peers(tuple(worker.row() for worker in self.workers.values() if worker.up))
        for key in self.workers:
            self.mail.send(key, everyone)

    def vitals(self, now: float) -> tuple[tuple[object, ...], ...]:
        return tuple(worker.vitals(now, self.config.stall_timeout) for worker in self.workers.values())

    def look(self, now: float) -> None:
        """At who was born, who stalls and who is gone."""
        if self._forks is not None:
            self._births(self._forks, now)
        for key, worker in list(self.workers.items()):
            if worker.leave_by is not None:
                if now >= worker.leave_by:
                    worker.kill()
            elif worker.restart_at is None and worker.fault is None:
                self._judge(key, worker, now)
            if worker.restart_at is not None:
                if now >= worker.restart_at:
                    self._hire(key)
            elif worker.gone():
                self._bury(key, worker, now)
        if now >= self._count_at:
            self._starved, self._count_at = starved_processes(), now + HEARTBEAT_S

    def forgive(self, seconds: float) -> None:
        """The machine stood still for so long, and nobody could move."""
        for worker in self.workers.values():
            worker.begun, worker.beat, worker.moved = worker.begun + seconds, worker.beat + seconds, worker.moved + seconds

    def _judge(self, key: PeerKey, worker: Worker, now: float) -> None:
        """End an actor that stalls, or that never gets ready."""
        limit = self._patience(worker)
        still, late = worker.stalled(now, self.config.stall_timeout), worker.late(now, limit)
        if still is not None:
            text = f"the {key[0]} stalled: nothing moved for {still:.1f} s, in incarnation {worker.post.incarnation}"
            worker.fault = Fault(code="engine_fault", message=text, actor=key[0])
            self.log.error("stalled", kind=key[0], index=key[1], seconds=still, load=worker.load)
            worker.kill()
        elif late is not None:
            text = f"the {key[0]} was not ready {late:.1f} s after its start, in incarnation {worker.post.incarnation}"
            worker.fault = Fault(code="start_error", message=text, field="start_timeout", limit=f"{limit:g} s", actor=key[0])
            self.log.error("not ready", kind=key[0], index=key[1], seconds=late, up=worker.up)
            worker.kill()

    def _patience(self, worker: Worker) -> float:
        """Seconds that it may take to start: much more than others of its kind took, and more after each attempt."""
        usual = self._usual.get(worker.post.kind)
        if usual is None:
            return self.config.start_timeout
        return min(self.config.start_timeout, max(self.config.stall_timeout, USUAL * usual) * 4.0**worker.failed_starts)

    def _bury(self, key: PeerKey, worker: Worker, now: float) -> None:
        if worker.pidfd is not None:
            self.mail.unwatch(worker.pidfd)
        worker.close()
        starved = key == EXECUTOR and worker.killed() and starved_processes() != self._starved
        worker.blameless = worker.by_hand or (worker.killed() and worker.fault is None and not starved)
        if worker.by_hand:
            self.log.info("restarted by hand", kind=key[0], index=key[1], death=worker.death())
            worker.up = False
            self.announce()
            self._hire(key)
            return
        code = "out_of_memory" if starved else "engine_fault"
        fault = worker.fault or Fault(code=code, message=f"the {key[0]} died: {worker.death()}", actor=key[0])
        self.log.error("actor died", kind=key[0], index=key[1], death=worker.death(), why=fault.message)
        if fault.code == "out_of_memory" and worker.ready:
            # What else takes memory may stay: the next executor sizes its cache again, beside a smaller worst case.
            self._token_budget = max(LEAST_BUDGET, worker.facts["token_budget"] // 2)
            self.log.warning("smaller steps", token_budget=self._token_budget)
        worker.failed_starts += not worker.ready and not worker.blameless
        if not self.started or worker.failed_starts >= len(BACKOFF_S):
            self.failure = fault
            return
        worker.up = worker.ready = False
        worker.restart_at = now + BACKOFF_S[min(worker.failed_starts, len(BACKOFF_S) - 1)]
        self.announce()
        if worker.restart_at <= now:
            self._hire(key)

    def restart(self, order: Order, now: float) -> None:
        """Replace an actor that an operator does not like; who is gone already is left in peace, however often the order is repeated."""
        key = order.kind, order.index
        worker = self.workers.get(key)
        if worker is None or worker.post.incarnation != order.incarnation or worker.by_hand:
            return
        self.log.info("restarting by hand", kind=order.kind, index=order.index, incarnation=order.incarnation, by=order.by)
        if worker.restart_at is not None:
            worker.restart_at = now  # it is dead already
            return
        worker.by_hand, worker.leave_by = True, now  # who does not listen yet, or is not even born, cannot be told
        if worker.up:
            worker.leave_by = now + STOP_S
            self.mail.send(key, Stop())

    def dismiss(self) -> None:
        """End everyone: in order, and who is still there after `STOP_S` seconds at once."""
        for key in self.workers:
            self.mail.send(key, Stop())
        until = time.monotonic() + STOP_S
        while time.monotonic() < until and not all(worker.gone() or not worker.pid for worker in self.workers.values()):
            time.sleep(0.01)
        for worker in self.workers.values():
            worker.kill()
        while not all(worker.gone() for worker in self.workers.values() if worker.pidfd is not None):
            time.sleep(0.001)
        for worker in self.workers.values():
            worker.close()
        if self._forks is not None:
            self._forks.close()


def starved_processes() -> int:
    """How many processes this machine's kernel has killed for want of memory. To a parent that looks like any SIGKILL; but what a step
    asked for may be the reason, and nobody's finger."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
