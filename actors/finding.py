"""Having adapters made ready: on threads, many at once, none twice at once; and what came of it, remembered for as long as it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from penstock.actors.errors import Fault, Refusal
from penstock.actors.preparing import Preparer, Version
from penstock.actors.sources.errors import SourceError
from penstock.engine.lora.errors import AdapterError

# Adapters that are made ready at once: of this machine, of others, which may be slow, and merged ones, which anybody may ask for by the
# hundred: they are in the way of each other alone.
NEAR, FAR, MERGED = 8, 32, 2
FAILED_S = 5.0  # for so long what failed is not tried again
MOST_KNOWN = 4096  # versions that are remembered

Key = tuple[str, ...]  # what is asked for; it may hold secrets, but for the first part, which is for people
Then = Callable[[Version | None, Fault | None], None]


class Finder:
    """`open` makes what prepares adapters, which takes seconds: it is called when the first one is asked for. `bell` is a descriptor that
    can be read when `collect` has something to tell."""

    def __init__(self, open: Callable[[], Preparer]) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.counts = {"prepared": 0, "failed": 0}
        self._open = open
        self._near, self._far = ThreadPoolExecutor(NEAR, "adapters"), ThreadPoolExecutor(FAR, "far adapters")
        self._merged = ThreadPoolExecutor(MERGED, "merged adapters")
        self._preparer: Future[Preparer] | None = None
        self._versions: dict[Key, tuple[float, Version]] = {}  # when it was known to be so
        self._failures: dict[Key, tuple[float, Fault]] = {}
        self._asked: dict[Key, list[tuple[int | None, Then]]] = {}  # what is under way, and who waits for it
        self._work_of: dict[Key, Future[None]] = {}
        self._waits: dict[int, Key] = {}
        self._done: list[tuple[Key, Version | None, Fault | None]] = []

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._asked)

    def ask(
        self, key: Key, work: Callable[[Preparer], Version], then: Then, fresh: float | None, *, far: bool, merged: bool = False,
        who: int | None = None,
    ) -> None:  # fmt: skip
        """Have something made ready, unless it has been known for less than `fresh` seconds, or (None) at all. `then` is called now, or by
        `collect`. `far`: another machine has it; `merged`: it is made of several. `who` may `leave`."""
        now = time.monotonic()
        if key in self._asked:
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
        self._asked[key] = []
        self._wait(key, who, then)
        if self._preparer is None or (self._preparer.done() and self._preparer.exception() is not None):
            self._preparer = self._near.submit(self._open)
        pool = self._merged if merged else self._far if far else self._near
        self._work_of[key] = pool.submit(self._work, key, work, self._preparer)

    def leave(self, who: int) -> None:
        """It does not wait any more. What nobody waits for is not begun."""
        key = self._waits.pop(who, None)
        if key is None:
            return
        self._asked[key] = [(other, then) for other, then in self._asked[key] if other != who]
        if not self._asked[key] and self._work_of[key].cancel():
            del self._asked[key], self._work_of[key]

    def leave_all(self, but: int) -> None:
        """Those whose number has another upper half: they were a gateway's that is no more."""
        for who in [who for who in self._waits if who >> 32 != but]:
            self.leave(who)

    def _wait(self, key: Key, who: int | None, then: Then) -> None:
        self._asked[key].append((who, then))
        if who is not None:
            self._waits[who] = key

    def collect(self) -> Iterator[tuple[str, Fault]]:
        """Call those who wait for what is done. Yields what has failed, and why."""
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            return
        done, self._done = self._done, []
        for key, version, fault in done:
            if version is not None:
                self.counts["prepared"] += 1
                self.remember(key, version)
            elif fault is not None:
                self.counts["failed"] += 1
                now = time.monotonic()
                self._failures = {one: found for one, found in self._failures.items() if now - found[0] < FAILED_S} | {key: (now, fault)}
                yield key[0], fault
            del self._work_of[key]
            for who, then in self._asked.pop(key):
                if who is not None:
                    self._waits.pop(who, None)
                then(version, fault)

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
        if key in self._asked:
            return "loading", ""
        if key in self._versions:
            return "host", ""
        return ("failed", self._failures[key][1].message) if key in self._failures else ("cold", "")

    def close(self) -> None:
        for pool in (self._near, self._far, self._merged):
            pool.shutdown(wait=False, cancel_futures=True)
        if not self._asked:  # else a thread may still ring it
            os.close(self.bell)

    def _work(self, key: Key, work: Callable[[Preparer], Version], preparer: Future[Preparer]) -> None:
        """On a thread."""
        version, fault = None, None
        try:
            version = work(preparer.result())
        except SourceError as error:
            fault = Fault(code="adapter_error", message=error.message, field="adapter", limit=error.code, retryable=error.retry)
        except Refusal as refusal:
            fault = refusal.fault
        except AdapterError as error:
            fault = Fault(code="adapter_error", message=error.message, field=error.field or "adapter", limit=error.code)
        except Exception as error:  # noqa: BLE001  nobody watches this thread, and who waits must hear of it
            fault = Fault(code="engine_fault", message=f"{type(error).__name__}: {error}", actor="adapters")
        self._done.append((key, version, fault))
        os.eventfd_write(self.bell, 1)


def _is_there(version: Version) -> bool:
    """On disk; it counts as used, then."""
    try:
        os.utime(version.path)
    except OSError:
        return False
    return True
