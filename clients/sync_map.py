"""`Client.map`: many prompts, a bounded number of them at once, from one thread."""

from __future__ import annotations

import heapq
import queue
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from penstock.clients.errors import PenstockError
from penstock.clients.inbox import Inbox
from penstock.clients.jobs import AHEAD, Job
from penstock.clients.thread import Pump
from penstock.clients.values import Outcome


def map_prompts(
    pump: Pump, prompts: Iterable[Any], concurrency: int, ordered: bool, retries: int, common: Mapping[str, Any]
) -> Iterator[Outcome]:
    """Prompts are taken from their source, in the caller's thread, whenever a place is free; the rest of the time it waits for ends."""
    work = _Work(pump, retries, common)
    source = enumerate(prompts)
    held: dict[int, Job] = {}
    handed = begun = 0
    fed = False
    try:
        while True:
            while not fed and len(work.open) < concurrency and begun - handed < AHEAD * concurrency:
                for index, item in source:
                    work.begin(Job(index, item))
                    begun = index + 1
                    break
                else:
                    fed = True
            if fed and handed == begun:
                return
            job = held.pop(handed, None) if ordered else None
            if job is None:
                job = work.next()
                if job is None or (ordered and job.index != handed):
                    if job is not None:
                        held[job.index] = job
                    continue
            handed += 1
            yield job.outcome()
    finally:
        work.cancel()


class _Work:
    def __init__(self, pump: Pump, retries: int, common: Mapping[str, Any]) -> None:
        self.open: dict[int, Job] = {}
        self._ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._again: list[tuple[float, int, Job]] = []
        self._pump, self._retries, self._common = pump, retries, common

    def begin(self, job: Job) -> None:
        self.open[job.index] = job
        try:
            job.error = None
            job.inbox = Inbox(job.order(self._common), lambda: self._ended.put(job), time.monotonic())
            self._pump.start(job.inbox)
        except PenstockError as error:
            job.inbox, job.error = None, error
            self._ended.put(job)

    def next(self) -> Job | None:
        """Wait for a job to end, or for the time to begin one again; then there is none."""
        try:
            job = self._ended.get(timeout=max(0.0, self._again[0][0] - time.monotonic()) if self._again else None)
        except queue.Empty:
            self.begin(heapq.heappop(self._again)[2])
            return None
        wait = job.wait(self._retries)
        if wait is not None:
            heapq.heappush(self._again, (time.monotonic() + wait, job.index, job))
            return None
        del self.open[job.index]
        return job

    def cancel(self) -> None:
        requests = [job.inbox.request for job in self.open.values() if job.inbox is not None and not job.inbox.over]
        if requests:
            self._pump.cancel(*requests)
