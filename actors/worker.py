"""One actor as the supervisor sees it: a process, or for debugging a thread."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

import zmq

from penstock.actors.actor import Post
from penstock.actors.errors import Fault
from penstock.actors.forkserver import ForkServer
from penstock.actors.process import build_actor

PATIENCE = 8  # times what its largest step took at the start: beside a long context it takes longer


class Worker(ABC):
    """What is known of an actor's current incarnation."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self.up = False
        self.ready = False
        self.facts: dict[str, Any] = {}
        self.load: dict[str, Any] = {}
        self.progress = 0
        self.begun = self.beat = self.moved = time.monotonic()
        self.fault: Fault | None = None
        self.failed_starts = 0  # in a row: deaths before it was ready
        self.restart_at: float | None = None
        self.leave_by: float | None = None  # it was told to end, or said that it will
        self.by_hand = False  # it was told to end by an operator, who wants another
        self.blameless = False  # nothing that it did was the cause of its end
        self.relieves = False  # it came for one that was blameless
        self.pidfd: int | None = None
        self.pid = os.getpid()

    @abstractmethod
    def gone(self) -> bool: ...

    @abstractmethod
    def death(self) -> str:
        """How it ended, for people."""

    def killed(self) -> bool:
        """Whether it was killed: unless that was our doing, it says nothing about how it would have done."""
        return False

    def kill(self) -> None:  # noqa: B027  a thread cannot be killed
        """End it now, if it is still there."""

    def close(self) -> None:  # noqa: B027  a thread holds nothing
        """Give back what the operating system holds for it."""

    def begin(self, facts: dict[str, Any], now: float) -> None:
        """It is ready: from now on it is expected to move."""
        self.ready, self.facts, self.failed_starts, self.beat, self.moved = True, facts, 0, now, now

    def heard(self, progress: int, load: dict[str, Any], now: float) -> None:
        """A heartbeat came."""
        if progress != self.progress or not load.get("in_flight"):
            self.moved = now
        self.beat, self.progress, self.load = now, progress, load

    def stalled(self, now: float, timeout: float) -> float | None:
        """For how long it has not moved, if that is too long: no heartbeat, or work in flight and no progress. Where one step takes long,
        as of a large model on a CPU, so may a heartbeat."""
        still = now - min(self.beat, self.moved)
        return still if self.ready and still > max(timeout, PATIENCE * self.facts.get("step_s", 0.0)) else None

    def late(self, now: float, timeout: float) -> float | None:
        """For how long it has been starting, if that is too long. An actor cannot beat while it loads: only the clock can tell."""
        since = now - self.begun
        return since if not self.ready and since > timeout else None

    def row(self) -> tuple[Any, ...]:
        post = self.post
        return post.kind, post.index, post.incarnation, post.address, self.ready, {**self.facts, "relieves": self.relieves}

    def vitals(self, now: float, stall_timeout: float) -> tuple[Any, ...]:
        leaving = self.restart_at is not None or self.leave_by is not None
        state = "restarting" if leaving else "starting" if not self.ready else "ready"
        if self.stalled(now, stall_timeout) is not None:
            state = "stalled"
        return self.post.kind, self.post.index, self.post.incarnation, state, self.pid, self.progress, self.load


class ProcessWorker(Worker):
    """A process, asked of the fork server. Until that answers, or the process itself is heard of, it has no process id."""

    def __init__(self, post: Post, forks: ForkServer) -> None:
        super().__init__(post)
        death, self._death = os.pipe()  # the write end is ours alone: it closes when we do, however that comes about
        self.pid = 0
        self._status: int | None = None
        try:
            forks.ask(post, death)
        finally:
            os.close(death)

    def born(self, pid: int) -> int:
        """It has this process id. Returns its pidfd, readable when it is gone."""
        self.pid, self.pidfd, self.begun = pid, os.pidfd_open(pid), time.monotonic()
        return self.pidfd

    def late(self, now: float, timeout: float) -> float | None:
        return super().late(now, timeout) if self.pid else None  # until it is born, the fork server is late

    def gone(self) -> bool:
        if self._status is None and self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def death(self) -> str:
        status = self._status
        if status is None:
            return "still alive"
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def killed(self) -> bool:
        return self._status == -signal.SIGKILL

    def kill(self) -> None:
        if self.pidfd is not None and not self.gone():
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        if self._death >= 0:
            with suppress(BrokenPipeError):
                os.write(self._death, b".")  # born unnoticed, it would take the pipe's end for ours
        for descriptor in (self.pidfd, self._death):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self.pidfd, self._death = None, -1


class ThreadWorker(Worker):
    """The same actor in this process, over inproc://. It cannot be killed, only asked to stop."""

    def __init__(self, post: Post, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__(post)
        self._actor = build_actor(post, context)
        self._thread = threading.Thread(target=self._actor.run, name=f"{post.kind}{post.index}", daemon=True)
        self._thread.start()

    def gone(self) -> bool:
        return not self._thread.is_alive()

    def death(self) -> str:
        return "its thread ended"
