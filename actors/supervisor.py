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
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from penstock.actors.actor import GATEWAY, HEARTBEAT_S, SCHEDULER
from penstock.actors.config import EngineConfig
from penstock.actors.crew import Crew
from penstock.actors.errors import Fault, Refusal
from penstock.actors.log import open_log
from penstock.actors.mailbox import Mailbox
from penstock.actors.messages import Died, Drain, Heartbeat, Order, Ready, Record, Up, Vitals
from penstock.actors.workplace import Workplace

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
        address = self.workplace.address("inproc://" if config.placement == "threads" else "ipc://", "supervisor")
        self.mail = Mailbox(self.context, address)
        self.door = config.address or f"ipc://{self.workplace.path}/door"
        self.crew = Crew(config, self.context, self.workplace, self.mail, address, self.door, self.log)
        self.stopping: str | None = None  # why
        self.drain_until: float | None = None
        self._death = death
        self._signals: int | None = None
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Up: self._up, Ready: self._ready, Heartbeat: self._heartbeat, Died: self._died,
            Order: self._order,
        }  # fmt: skip

    def run(self) -> int:
        """Returns the exit status: 0, or 1 if the engine failed."""
        try:
            if self._death is not None:
                self.mail.watch(self._death)
            if self.config.placement == "processes":
                ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            self.crew.hire_all()
            self._loop()
        finally:
            self._end()
        return 1 if self.crew.failure is not None else 0

    def stop(self, why: str) -> None:
        """Drain, then stop. A second call stops at once."""
        if self.drain_until is not None or not self.crew.started:
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

    # ── what actors say ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _up(self, message: Up) -> None:
        worker = self.crew.sender(message)
        if worker is not None:
            self.crew.listens(worker, message.address, message.pid)

    def _ready(self, message: Ready) -> None:
        worker = self.crew.sender(message)
        if worker is None:
            return
        if message.facts.get("drained"):
            self.stopping = self.stopping or "drained"
            return
        if message.facts.get("open"):  # the gateway has met everyone and takes requests
            self._tell_vitals(time.monotonic())  # so that the first to ask for the status finds everybody
            if not self.crew.started:
                self.crew.started = True
                self.log.info("engine ready", address=self.door)
                self.report({"ready": self.door, "directory": str(self.workplace.path), "pid": os.getpid()})
            return
        self.crew.begin(worker, message.facts, time.monotonic())
        if self.drain_until is not None:
            self.mail.send(GATEWAY, Drain())  # one that was started anew does not know
        self._tell_vitals(time.monotonic())

    def _heartbeat(self, message: Heartbeat) -> None:
        worker = self.crew.sender(message)
        if worker is not None:
            worker.heard(message.progress, message.load, time.monotonic())

    def _died(self, message: Died) -> None:
        worker = self.crew.sender(message)
        if worker is not None:
            worker.fault = Fault.from_wire(message.error)
            worker.leave_by = time.monotonic() + self.config.stall_timeout  # it says so last: what is left may hang all the same

    def _order(self, message: Order) -> None:
        if message.order == "restart":
            self.crew.restart(message, time.monotonic())
            self._tell_vitals(time.monotonic())
        elif self.drain_until is None:  # said again it must not do what a second signal does
            self.stop(f"drained by {message.by or 'an operator'}")

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _loop(self) -> None:
        vitals, last = 0.0, time.monotonic()
        while self.stopping is None:
            woken = self.mail.wait(0.1 if self.config.placement == "threads" else HEARTBEAT_S)
            still = time.monotonic() - last - HEARTBEAT_S
            if still > HEARTBEAT_S:  # not even this process got on
                self.crew.forgive(still)
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
            if self.stopping is None:
                self.crew.look(now)
            if self.crew.failure is not None:
                self.stopping = self.crew.failure.message
            if self.drain_until is not None and now >= self.drain_until:
                self.stopping = "drain timeout"
            if now >= vitals:
                self._tell_vitals(now)
                vitals = now + HEARTBEAT_S
            last = now

    def _tell_vitals(self, now: float) -> None:
        self.mail.send(GATEWAY, Vitals(self.crew.vitals(now)))

    def _end(self) -> None:
        self.log.info("stopping", why=self.stopping)
        if self.crew.failure is not None and not self.crew.started:
            self.report({"error": self.crew.failure.to_wire()})
        self.crew.dismiss()
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
