"""`AsyncClient.map`: many prompts, a bounded number of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import Any

from penstock.clients.errors import PenstockError
from penstock.clients.inbox import Inbox
from penstock.clients.jobs import AHEAD, Job
from penstock.clients.pump import Pump
from penstock.clients.values import Outcome


async def map_prompts(
    pump: Pump, prompts: Iterable[Any] | AsyncIterable[Any], concurrency: int, ordered: bool, retries: int, common: Mapping[str, Any]
) -> AsyncIterator[Outcome]:
    """One task takes prompts from the source; a request costs a callback at its end, not a task."""
    work = _Work(pump, asyncio.Semaphore(concurrency), asyncio.Semaphore(AHEAD * concurrency), retries, common)
    feeder = asyncio.create_task(work.feed(prompts))
    held: dict[int, Job] = {}
    handed = 0
    try:
        while True:
            job = held.pop(handed, None) if ordered else None
            if job is None:
                if work.fed and handed == work.begun:
                    await feeder  # raises what the source raised
                    return
                job = await work.ended.get()
                if job is None:
                    continue  # the source has ended: look again whether this was all
                if ordered and job.index != handed:
                    held[job.index] = job
                    continue
            handed += 1
            work.ahead.release()
            yield job.outcome()
    finally:
        feeder.cancel()
        work.cancel()


class _Work:
    def __init__(self, pump: Pump, slots: asyncio.Semaphore, ahead: asyncio.Semaphore, retries: int, common: Mapping[str, Any]) -> None:
        self.ahead, self.begun, self.fed = ahead, 0, False
        self.ended: asyncio.Queue[Job | None] = asyncio.Queue()
        self._pump, self._slots, self._retries, self._common = pump, slots, retries, common
        self._open: dict[int, Job] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    async def feed(self, prompts: Iterable[Any] | AsyncIterable[Any]) -> None:
        try:
            async for item in _each(prompts):
                await self.ahead.acquire()
                await self._slots.acquire()
                job = self._open[self.begun] = Job(self.begun, item)
                self.begun += 1
                self._begin(job)
        finally:
            self.fed = True
            self.ended.put_nowait(None)

    def cancel(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        requests = [job.inbox.request for job in self._open.values() if job.inbox is not None and not job.inbox.over]
        self._open.clear()
        if requests:
            self._pump.cancel(*requests)

    def _begin(self, job: Job) -> None:
        self._timers.pop(job.index, None)
        try:
            job.error = None
            job.inbox = Inbox(job.order(self._common), lambda: self._end(job), self._pump.loop.time())
            self._pump.start(job.inbox)
        except PenstockError as error:
            job.inbox, job.error = None, error
            self._end(job)

    def _end(self, job: Job) -> None:
        if self._open.get(job.index) is not job:
            return
        wait = job.wait(self._retries)
        if wait is not None:
            self._timers[job.index] = self._pump.loop.call_later(wait, self._begin, job)
            return
        del self._open[job.index]
        self._slots.release()
        self.ended.put_nowait(job)


async def _each(prompts: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(prompts, AsyncIterable):
        async for item in prompts:
            yield item
    else:
        for item in prompts:
            yield item
