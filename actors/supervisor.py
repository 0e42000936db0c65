"""The supervisor: starts every actor, tells each of the others, restarts what dies, and ends everything in order.

    python -m penstock.actors.supervisor --fd-config N --fd-report N --fd-death N      (started by penstock.clients.launch)

It has the same loop as every actor, and wakes up for more: an actor that was forked or that exits (its pidfd), a signal, and the death
of the process that launched it (a pipe). It writes one JSON line, `{"ready": ADDRESS}` or `{"error": FAULT}`, for whoever launched it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from penstock.actors.actor import GATEWAY, HEARTBEAT_S, SCHEDULER, PeerKey, Post
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault, Refusal
from penstock.actors.forkserver import ForkServer
from penstock.actors.log import open_log
from penstock.actors.mailbox import Mailbox
from penstock.actors.messages import Died, Drain, Heartbeat, Peers, Ready, Record, Stop, Up, Vitals
from penstock.actors.worker import ProcessWorker, ThreadWorker, Worker
from penstock.actors.workplace import Workplace

BACKOFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)  # before the nth start in a row of an actor that never was ready; beyond these the engine gives up
STOP_S = 5.0
LEAST_BUDGET = 64  # tokens in a step, however often memory runs out
PR_SET_CHILD_SUBREAPER = 36

Report = Callable[[dict[str, Any]], None]


class Supervisor:
    """Runs an engine until it is told to stop. `report` gets one map: ready, or the error that kept the engine from starting."""

    def __init__(self, config: EngineConfig, report: Report, *, death: int | None = None) -> None:
        self.config = config
        self.report = report
        self.log = open_log(config.log_level, config.log_file, actor="supervisor")
        self.workplace = Workplace(config.directory)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.scheme = "inproc://" if config.placement == "threads" else "ipc://"
        self.address = self._address("supervisor")
        self.mail = Mailbox(self.context, self.address)
        self.door = config.address or f"ipc://{self.workplace.path}/door"
        self.workers: dict[PeerKey, Worker] = {}
        self.forks: ForkServer | None = None  # none with threads
        self.barren = 0  # fork servers in a row that died before they had forked anything
        self.incarnations = 0
        self.token_budget = config.token_budget
        self.announced = False  # ready was reported
        self.stopping: str | None = None  # why
        self.drain_until: float | None = None
        self.failure: Fault | None = None
        self._death = death
        self._signals: int | None = None
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Up: self._up, Ready: self._ready, Heartbeat: self._heartbeat, Died: self._died,
        }  # fmt: skip

    def run(self) -> int:
        """Returns the exit status: 0, or 1 if the engine failed."""
        try:
            if self._death is not None:
                self.mail.watch(self._death)
            if self.config.placement == "processes":
                ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                self._open_forks()
            self._crew()
            self._loop()
        finally:
            self._end()
        return 1 if self.failure is not None else 0

    def stop(self, why: str) -> None:
        """Drain, then stop. A second call stops at once."""
        if self.drain_until is not None or not self.announced:
            self.stopping = why
            return
        self.log.info("draining", why=why, seconds=self.config.drain_timeout)
        self.drain_until = time.monotonic() + self.config.drain_timeout
        self.mail.send(GATEWAY, Drain())

    def on_signals(self) -> None:
        """Let SIGINT and SIGTERM stop the engine, and SIGUSR1 write a recording of its scheduler. For the main thread of a process only."""
        self._signals, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write)
        self.mail.watch(self._signals)

    # ── starting ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _crew(self) -> None:
        counts = {  # the executor last: what it needs takes long to import, and the others are forked before
            "tokenizer": self.config.tokenizers, "detokenizer": self.config.detokenizers, "scheduler": 1, "gateway": 1, "executor": 1,
        }  # fmt: skip
        for kind, count in counts.items():
            for index in range(count):
                self._hire((kind, index))

    def _hire(self, key: PeerKey) -> None:
        self.incarnations += 1
        kind, index = key
        config = self.config.to_wire() | {"address": self.door, "token_budget": self.token_budget}
        post = Post(
            kind, index, self.incarnations, self._address(f"{kind}{index}.{self.incarnations}"), self.address,
            str(self.workplace.path), EngineConfig.from_wire(config),
        )  # fmt: skip
        before = self.workers.get(key)
        worker: Worker = ThreadWorker(post, self.context) if self.forks is None else ProcessWorker(post, self.forks)
        worker.failed_starts = 0 if before is None else before.failed_starts
        self.workers[key] = worker

    def _open_forks(self) -> None:
        self.forks = ForkServer()
        self.mail.watch(self.forks.control.fileno())

    def _births(self, forks: ForkServer) -> None:
        """Take in what the fork server made; if it died, there is another, and it is asked for what this one was asked."""
        by_incarnation = {worker.post.incarnation: worker for worker in self.workers.values() if isinstance(worker, ProcessWorker)}
        while (news := forks.born()) is not None:
            worker = by_incarnation.get(news[0])
            if worker is not None:
                self.mail.watch(worker.born(news[1]))
                self.barren = 0
        if forks.gone() and self.stopping is None:
            self.log.error("the fork server died")
            self.mail.unwatch(forks.control.fileno())
            forks.close()
            self.barren += 1
            if self.barren >= len(BACKOFF_S):
                self.failure = Fault(code="start_error", message="the fork server cannot run: see its error output")
                self.stopping = "the fork server cannot run"
                return
            self._open_forks()
            for worker in by_incarnation.values():
                if not worker.pid:
                    worker.close()  # should it have been born after all, it ends with its pipe
                    self._hire((worker.post.kind, worker.post.index))

    def _address(self, name: str) -> str:
        return f"{self.scheme}{self.workplace.path}/{name}.{secrets.token_hex(3)}"

    # ── what actors say ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _worker(self, message: Up | Ready | Heartbeat | Died) -> Worker | None:
        worker = self.workers.get((message.kind, message.index))
        return worker if worker is not None and worker.post.incarnation == message.incarnation else None

    def _up(self, message: Up) -> None:
        worker = self._worker(message)
        if worker is not None:
            worker.up = True
            self.mail.connect((message.kind, message.index), message.address)
            self._announce()

    def _ready(self, message: Ready) -> None:
        worker = self._worker(message)
        if worker is None:
            return
        if message.facts.get("drained"):
            self.stopping = self.stopping or "drained"
            return
        if message.facts.get("open"):  # the gateway has met everyone and takes requests
            if not self.announced:
                self.announced = True
                self._tell_vitals(time.monotonic())  # so that the first to ask for the status finds everybody
                self.log.info("engine ready", address=self.door)
                self.report({"ready": self.door, "directory": str(self.workplace.path), "pid": os.getpid()})
            return
        worker.begin(message.facts, time.monotonic())
        self._announce()
        if self.drain_until is not None:
            self.mail.send(GATEWAY, Drain())  # one that was started anew does not know

    def _heartbeat(self, message: Heartbeat) -> None:
        worker = self._worker(message)
        if worker is not None:
            worker.heard(message.progress, message.load, time.monotonic())

    def _died(self, message: Died) -> None:
        worker = self._worker(message)
        if worker is not None:
            worker.fault = Fault.from_wire(message.error)

    def _announce(self) -> None:
        everyone = Peers(tuple(worker.row() for worker in self.workers.values() if worker.up))
        for key in self.workers:
            self.mail.send(key, everyone)

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _loop(self) -> None:
        vitals = 0.0
        while self.stopping is None:
            woken = self.mail.wait(0.1 if self.config.placement == "threads" else HEARTBEAT_S)
            while (message := self.mail.receive()) is not None:
                self._handlers[type(message)](message)
            if self._signals is not None and self._signals in woken:
                numbers = os.read(self._signals, 64)
                if signal.SIGUSR1 in numbers:
                    self.mail.send(SCHEDULER, Record())
                if set(numbers) != {signal.SIGUSR1}:
                    self.stop("signal")
            if self._death is not None and self._death in woken:
                self.stopping = "the process that launched this engine is gone"
            now = time.monotonic()
            self._reap(now)
            if self.drain_until is not None and now >= self.drain_until:
                self.stopping = "drain timeout"
            if now >= vitals:
                self._tell_vitals(now)
                vitals = now + HEARTBEAT_S

    def _tell_vitals(self, now: float) -> None:
        self.mail.send(GATEWAY, Vitals(tuple(worker.vitals(now, self.config.stall_timeout) for worker in self.workers.values())))

    def _reap(self, now: float) -> None:
        if self.forks is not None:
            self._births(self.forks)
        for key, worker in list(self.workers.items()):
            still = worker.stalled(now, self.config.stall_timeout)
            if still is not None and worker.fault is None:
                text = f"the {key[0]} stalled: nothing moved for {still:.1f} s, in incarnation {worker.post.incarnation}"
                worker.fault = Fault(code="engine_fault", message=text, actor=key[0])
                self.log.error("stalled", kind=key[0], index=key[1], seconds=still, load=worker.load)
                worker.kill()
            if worker.restart_at is not None:
                if now >= worker.restart_at:
                    self._hire(key)
            elif worker.gone() and self.stopping is None:
                self._bury(key, worker, now)

    def _bury(self, key: PeerKey, worker: Worker, now: float) -> None:
        if worker.pidfd is not None:
            self.mail.unwatch(worker.pidfd)
        worker.close()
        fault = worker.fault or Fault(code="engine_fault", message=f"the {key[0]} died: {worker.death()}", actor=key[0])
        self.log.error("actor died", kind=key[0], index=key[1], death=worker.death(), why=fault.message)
        if fault.code == "out_of_memory" and worker.ready:
            # What else takes memory may stay: the next executor sizes its cache again, beside a smaller worst case.
            self.token_budget = max(LEAST_BUDGET, worker.facts["token_budget"] // 2)
            self.log.warning("smaller steps", token_budget=self.token_budget)
        worker.failed_starts += not worker.ready
        if not self.announced or (worker.failed_starts >= len(BACKOFF_S) and not worker.killed()):
            self.failure = fault
            self.stopping = f"the {key[0]} cannot run"
            return
        worker.up = worker.ready = False
        worker.restart_at = now + BACKOFF_S[min(worker.failed_starts, len(BACKOFF_S) - 1)]
        self._announce()
        if worker.restart_at <= now:
            self._hire(key)

    def _end(self) -> None:
        self.log.info("stopping", why=self.stopping)
        if self.failure is not None and not self.announced:
            self.report({"error": self.failure.to_wire()})
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
        if self.forks is not None:
            self.forks.close()
        self.mail.close()
        self.context.destroy(linger=0)
        self.workplace.close()
        self.log.info("stopped")


def main() -> None:
    """Entry point for `launch`: the configuration comes in, and the report goes out, over inherited pipes."""
    parser = argparse.ArgumentParser()
    for name in ("config", "report", "death"):
        parser.add_argument(f"--fd-{name}", type=int, required=True)
    arguments = parser.parse_args()
    with os.fdopen(arguments.fd_config) as pipe:
        values = json.load(pipe)
    os.set_inheritable(arguments.fd_death, False)

    def report(news: dict[str, Any]) -> None:
        with suppress(BrokenPipeError), os.fdopen(arguments.fd_report, "w") as out:
            out.write(json.dumps(news) + "\n")

    try:
        supervisor = Supervisor(EngineConfig.from_wire(values), report, death=arguments.fd_death)
    except Refusal as refusal:
        report({"error": refusal.fault.to_wire()})
        sys.exit(1)
    supervisor.on_signals()
    sys.exit(supervisor.run())


if __name__ == "__main__":
    main()
