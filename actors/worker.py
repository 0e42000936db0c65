"""One actor as the supervisor sees it: a process, or for debugging a thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

import zmq

from penstock.actors.actor import Post
from penstock.actors.errors import Fault
from penstock.actors.process import build_actor, post_to_json


class Worker(ABC):
    """What is known of an actor's current incarnation."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self.up = False
        self.ready = False
        self.facts: dict[str, Any] = {}
        self.load: dict[str, Any] = {}
        self.progress = 0
        self.begun = self.beat = time.monotonic()
        self.fault: Fault | None = None
        self.starts = 1  # in a row, this one included
        self.restart_at: float | None = None
        self.pidfd: int | None = None
        self.pid = os.getpid()

    @abstractmethod
    def gone(self) -> bool: ...

    @abstractmethod
    def death(self) -> str:
        """How it ended, for people."""

    def kill(self) -> None:  # noqa: B027  a thread cannot be killed
        """End it now, if it is still there."""

    def close(self) -> None:  # noqa: B027  a thread holds nothing
        """Give back what the operating system holds for it."""

    def healthy(self, seconds: float) -> bool:
        """Whether it was ready for long enough for its death not to count as a failed start."""
        return self.ready and time.monotonic() - self.begun >= seconds

    def row(self) -> tuple[Any, ...]:
        post = self.post
        return post.kind, post.index, post.incarnation, post.address, self.ready, self.facts

    def vitals(self, now: float, stall_timeout: float) -> tuple[Any, ...]:
        state = "restarting" if self.restart_at is not None else "starting" if not self.ready else "ready"
        if self.ready and now - self.beat > stall_timeout:
            state = "stalled"
        return self.post.kind, self.post.index, self.post.incarnation, state, self.pid, self.progress, self.load


class ProcessWorker(Worker):
    def __init__(self, post: Post) -> None:
        super().__init__(post)
        post_read, post_write = os.pipe()
        death_read, self._death = os.pipe()  # the write end is ours alone: it closes when we do, however that comes about
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.actors.process", "--fd-post", str(post_read), "--fd-death", str(death_read)],
                pass_fds=(post_read, death_read),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
            )
        finally:
            os.close(post_read)
            os.close(death_read)
        with suppress(BrokenPipeError), os.fdopen(post_write, "w") as pipe:  # it may be dead already: that is noticed elsewhere
            pipe.write(post_to_json(post))
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def gone(self) -> bool:
        return self._process.poll() is not None

    def death(self) -> str:
        status = self._process.returncode
        if status is None:
            return "still alive"
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def kill(self) -> None:
        if not self.gone():
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
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
