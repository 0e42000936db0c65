"""Having adapters made ready: on threads, many at once, none twice at once; and what came of it, remembered for as long as it holds."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event

from penstock.actors.errors import Fault, Refusal
from penstock.actors.preparing import Preparer, Version
from penstock.actors.sources.errors import SourceError
from penstock.engine.lora.errors import AdapterError

# Adapters that are made ready at once: of this machine, of others, which may be slow, and merged ones, which anybody may ask for by the
# hundred: they are in the way of each other alone.
NEAR, FAR, MERGED = 8, 32, 2
FAILED_S = 5.0  # for so long what failed is not tried again
GRACE_S = 2.0  # for so long what has begun goes on although nobody waits for it: a gateway that takes another's place asks again
MOST_KNOWN = 4096  # versions that are remembered

Key = tuple[str, ...]  # what is asked for; it may hold secrets, but for the first part, which is for people
Then = Callable[[Version | None, Fault | None], None]


@dataclass(slots=True, eq=False)
class Lane:
    """Threads, and what waits for one of them. What is left goes from here at once: a pool's own queue would keep it."""

    threads: int
    pool: ThreadPoolExecutor
    busy: int = 0
    queue: OrderedDict[Key, Task] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class Task:
    """Something that is made ready, and who waits for it."""

    key: Key
    work: Callable[[Preparer], Version]
    lane: Lane
    once: bool
    waiting: list[tuple[int | None, Then]] = field(default_factory=list)
    left: float = 0.0  # when the last of them left
    stop: Event = field(default_factory=Event)


class Finder:
    """`open` makes what prepares adapters, which takes seconds: it is called when the first one is asked for. `bell` is a descriptor that
    can be read when `collect` has something to tell."""

    def __init__(self, open: Callable[[], Preparer]) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.counts = {"prepared": 0, "failed": 0}
        self._open = open
        lanes = ((NEAR, "adapters"), (FAR, "far adapters"), (MERGED, "merged adapters"))
        self._near, self._far, self._merged = [Lane(threads, ThreadPoolExecutor(threads, name)) for threads, name in lanes]
        self._preparer: Future[Preparer] | None = None
        self._versions: dict[Key, tuple[float, Version]] = {}  # when it was known to be so
        self._failures: dict[Key, tuple[float, Fault]] = {}
        self._tasks: dict[Key, Task] = {}  # that somebody waits for
        self._waits: dict[int, Key] = {}
        self._done: list[tuple[Task, Version | None, Fault | None]] = []

    def __len__(self) -> int:
        """How many are under way."""
        return sum(lane.busy + len(lane.queue) for lane in self._lanes)

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        return self._near, self._far, self._merged

    def ask(
        self, key: Key, work: Callable[[Preparer], Version], then: Then, fresh: float | None, *, far: bool, merged: bool = False,
        who: int | None = None, once: bool = False,
    ) -> None:  # fmt: skip
        """Have something made ready, unless it has been known for less than `fresh` seconds, or (None) at all. `then` is called now, or by
        `collect`. `far`: another machine has it; `merged`: it is made of several. `who` may `leave`. `once`: nobody will ask for it
        by this key again."""
        now = time.monotonic()
        if key in self._tasks:
            self._wait(key, who, then)
            return
        version, (when, _) = self.known(key), self._versions.get(key, (0.0, None))
        if version is not None and (fresh is None or now - when < fresh) and _is_there(version):
            then(version, None)
            return
        when, fault = self._failures.get(key, (0.0, None))
        if fault is not None and now - when < FAILED_S:
            then(None, fault)
            return
        lane = self._merged if merged else self._far if far else self._near
        self._tasks[key] = lane.queue[key] = Task(key, work, lane, once)
        self._wait(key, who, then)
        self._begin(lane)

    def leave(self, who: int) -> None:
        """It does not wait any more. What nobody waits for is not begun, or ends some time later: see `collect`."""
        key = self._waits.pop(who, None)
        if key is None:
            return
        task = self._tasks[key]
        task.waiting = [(other, then) for other, then in task.waiting if other != who]
        task.left = time.monotonic()
        if not task.waiting and task.lane.queue.pop(key, None) is not None:
            del self._tasks[key]

    def leave_all(self, but: int) -> None:
        """Those whose number has another upper half: they were a gateway's that is no more."""
        for who in [who for who in self._waits if who >> 32 != but]:
            self.leave(who)

    def _wait(self, key: Key, who: int | None, then: Then) -> None:
        self._tasks[key].waiting.append((who, then))
        if who is not None:
            self._waits[who] = key

    def _begin(self, lane: Lane) -> None:
        """As many as there are threads for."""
        while lane.queue and lane.busy < lane.threads:
            _, task = lane.queue.popitem(last=False)
            if self._preparer is None or (self._preparer.done() and self._preparer.exception() is not None):
                self._preparer = self._near.pool.submit(self._open)
            lane.busy += 1
            lane.pool.submit(self._work, task, self._preparer)

    def collect(self) -> Iterator[tuple[str, Fault]]:
        """Call those who wait for what is done, and stop what nobody waits for any more. Yields what has failed, and why."""
        self._stop_left(time.monotonic() - GRACE_S)
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            return
        done, self._done = self._done, []
        for task, version, fault in done:
            task.lane.busy -= 1
            self._begin(task.lane)
            if version is not None:
                self.counts["prepared"] += 1
                if not (task.once or task.stop.is_set()):  # one of the same key may have been begun since
                    self.remember(task.key, version)
            if self._tasks.get(task.key) is not task:  # it was stopped, which tells nothing of its source
                continue
            del self._tasks[task.key]
            if fault is not None:
                self.counts["failed"] += 1
                now = time.monotonic()
                self._failures = {key: found for key, found in self._failures.items() if now - found[0] < FAILED_S}
                self._failures[task.key] = now, fault
                yield task.key[0], fault
            for who, then in task.waiting:
                if who is not None:
                    self._waits.pop(who, None)
                then(version, fault)

    def _stop_left(self, before: float) -> None:
        for key, task in list(self._tasks.items()):
            if not task.waiting and task.left < before:
                del self._tasks[key]
                task.stop.set()

    def known(self, key: Key) -> Version | None:
        if (found := self._versions.pop(key, None)) is None:
            return None
        self._versions[key] = found  # who was asked for longest ago is forgotten first
        return found[1]

    def remember(self, key: Key, version: Version) -> None:
        self._versions.pop(key, None)
        self._versions[key] = time.monotonic(), version
        if len(self._versions) > MOST_KNOWN:
            del self._versions[next(iter(self._versions))]

    def state(self, key: Key) -> tuple[str, str]:
        """loading, host (it is ready on this machine), failed or cold; and why it failed."""
        if key in self._tasks:
            return "loading", ""
        if key in self._versions:
            return "host", ""
        return ("failed", self._failures[key][1].message) if key in self._failures else ("cold", "")

    def close(self) -> None:
        for task in self._tasks.values():
            task.stop.set()
        for lane in self._lanes:
            lane.pool.shutdown(wait=False, cancel_futures=True)
        if not any(lane.busy for lane in self._lanes):  # else a thread may still ring it
            os.close(self.bell)

    def _work(self, task: Task, preparer: Future[Preparer]) -> None:
        """On a thread."""
        version, fault = None, None
        try:
            version = task.work(preparer.result().until(task.stop))
        except SourceError as error:
            fault = Fault(code="adapter_error", message=error.message, field="adapter", limit=error.code, retryable=error.retry)
        except Refusal as refusal:
            fault = refusal.fault
        except AdapterError as error:
            fault = Fault(code="adapter_error", message=error.message, field=error.field or "adapter", limit=error.code)
        except Exception as error:  # noqa: BLE001  nobody watches this thread, and who waits must hear of it
            fault = Fault(code="engine_fault", message=f"{type(error).__name__}: {error}", actor="adapters")
        self._done.append((task, version, fault))
        os.eventfd_write(self.bell, 1)


def _is_there(version: Version) -> bool:
    """On disk; it counts as used, then."""
    try:
        os.utime(version.path)
    except OSError:
        return False
    return True
