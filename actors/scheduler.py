"""The scheduler actor: requests in, plans out, results in, tokens out. All decisions are engine.scheduler's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from penstock.actors.actor import EXECUTOR, GATEWAY, HEARTBEAT_S, Actor, Peer, PeerKey
from penstock.actors.columns import int32, int64, request_from, result_from_done, step_from_plan, token_rows
from penstock.actors.errors import Refusal
from penstock.actors.messages import Abort, Begin, Emitted, Journaled, Load, Loaded, Pin, Record, StepDone, Submit
from penstock.actors.recordings import keep, recordings_folder
from penstock.engine.plan import MOST_AHEAD
from penstock.engine.recorder import RecordedScheduler
from penstock.engine.recording import encode
from penstock.engine.request import Adapter, Request
from penstock.engine.scheduler import Commit, Ended, Scheduler, SchedulerConfig

Handles = TypeVar("Handles", int, npt.NDArray[np.int64])
SHORT_S = 0.003  # a step
HOST_SAMPLES = 1024  # steps that the host time's percentiles are over
UNJOURNALED = 32  # messages that may be on their way to the journal: beyond that the CPU is the bottleneck, and queues would only grow


class SchedulerActor(Actor):
    """Holds no secrets: everything here can be lost. Whenever it holds nothing, or a peer that it depends on was replaced, it says
    `Begin`, and the gateway hands over every open request again."""

    kind = "scheduler"

    def start(self) -> dict[str, Any]:
        self.scheduler: Scheduler | None = None
        self.executor = 0  # incarnation
        self.opens: list[tuple[Any, ...]] = []  # streams that the detokenizers must be told of
        self.commits: deque[Commit] = deque()
        self.crew: set[int] = set()  # incarnations of the peers that streams depend on, as of the last Begin
        self.flying: list[int] = []  # streams that were in a step of an executor that died since
        self.step_seconds = 0.0
        self.ahead, self.beside = 1, False  # plans, and whether the executor launches the next step while one runs
        self.spent = 0.0  # CPU seconds of plan and commit since the last commit
        self.host_seconds: deque[float] = deque(maxlen=HOST_SAMPLES)
        self.pinned: tuple[Adapter, ...] = ()
        self.loads = 0  # of adapters, that were ordered
        self.handlers |= {Submit: self._submit, Abort: self._abort, StepDone: self._commit, Journaled: self._journaled}
        self.handlers |= {Loaded: self._loaded, Pin: self._pin}
        self.handlers[Record] = lambda _: self._record("asked")
        self._forget_progress()
        return {}

    def met(self, before: dict[PeerKey, Peer]) -> None:
        executor = self.peers.get(EXECUTOR)
        if executor is not None and executor.ready and executor.incarnation != self.executor:
            self.executor = executor.incarnation
            if self.scheduler is not None and not executor.facts.get("relieves"):
                self.flying += self.scheduler.flying_handles()
            self.scheduler, self.beside = self._new_scheduler(executor.facts), executor.facts["device"] == "cuda"
            self.ahead = plans_ahead(self.config.lookahead, SHORT_S, beside=self.beside)
            self._repin((), self.pinned)
            self.opens.clear()
            self.commits.clear()
        needed = [EXECUTOR, GATEWAY, *(("detokenizer", index) for index in range(self.config.detokenizers))]
        crew = [self.peers[key] for key in needed if key in self.peers]
        incarnations = {peer.incarnation for peer in crew}
        whole = len(crew) == len(needed) and all(peer.ready or peer.kind == "gateway" for peer in crew)
        if self.scheduler is None or not whole or incarnations == self.crew:
            return
        self.crew = incarnations
        self._forget_progress()
        now = time.monotonic()
        for handle in self.scheduler.open_handles():
            if handle >> 32 != self.peers[GATEWAY].incarnation:
                self.scheduler.abort(handle, now)
        self.mail.send(GATEWAY, Begin(self.post.incarnation, np.array(self.flying, np.int64).tobytes()))
        self.flying = []

    def _new_scheduler(self, facts: dict[str, Any]) -> Scheduler:
        config = SchedulerConfig(
            slots=facts["slots"],
            blocks=facts["blocks"],
            block_size=facts["block_size"],
            token_budget=facts["token_budget"],
            max_model_len=facts["max_model_len"],
            prefix_cache=self.config.prefix_cache,
            quantum=(64 if facts["device"] == "cuda" else 16) if self.config.quantum is None else self.config.quantum,
            adapter_pages=facts["adapters"]["pages"] if facts["adapters"] else 0,
        )
        if not self.config.record_ring:
            return Scheduler(config)
        return RecordedScheduler(config, self.config.record_ring << 20, text=self.config.record_text)

    def crashed(self) -> None:
        self._record("crash")

    def _record(self, why: str) -> None:
        """Write down what the flight recorder holds. Plans wait meanwhile: a fraction of a second."""
        if not isinstance(self.scheduler, RecordedScheduler):
            self.log.warning("nothing is recorded", why=why)
            return
        try:
            path = keep(recordings_folder(self.config), encode(self.scheduler))
            self.log.warning("recorded", why=why, file=str(path), calls=len(self.scheduler.calls))
        except (OSError, Refusal) as error:
            self.log.error("recording lost", why=why, error=str(error))

    def _forget_progress(self) -> None:
        """Messages to each detokenizer since the last Begin: sent, and known to be journaled."""
        self.emitted = [0] * self.config.detokenizers
        self.journaled = [0] * self.config.detokenizers

    def _journaled(self, message: Journaled) -> None:
        self.journaled[message.index] = max(self.journaled[message.index], min(message.number, self.emitted[message.index]))

    def _submit(self, message: Submit) -> None:
        if self.scheduler is None or message.handle >> 32 < self.newest.get(GATEWAY, 0):
            return  # it will be handed over again after Begin; or nobody will read it, since its gateway is no more
        request: Request = request_from(message)
        try:
            self.scheduler.submit(request, time.monotonic())
        except ValueError as error:
            self.log.error("refused", handle=message.handle, error=str(error))
            code = "engine_fault" if self.scheduler.fits_adapter(request.adapter) else "adapter_error"
            facts = {"error": f"the scheduler cannot run this request: {error}", "code": code}
            opened = (message.handle, message.attempt, message.decode, message.prompt, message.generated)
            index = detokenizer_of(message.handle, self.config.detokenizers)
            self._send(index, (opened,), b"", b"", b"", b"", ((message.handle, message.attempt, "error", facts),), (), ())
            return
        self.opens.append((message.handle, message.attempt, message.decode, message.prompt, message.generated))

    def _abort(self, message: Abort) -> None:
        if self.scheduler is not None:
            now = time.monotonic()
            for handle, attempt in zip(int64(message.handles).tolist(), int32(message.attempts).tolist(), strict=True):
                if attempt in (0, self.scheduler.attempt(handle)):
                    self.scheduler.abort(handle, now)

    def _is_ours(self, message: StepDone | Loaded) -> bool:
        """Not from an executor, nor for a scheduler, that is no more."""
        return message.executor == self.executor and message.scheduler == self.post.incarnation

    def _loaded(self, message: Loaded) -> None:
        if self.scheduler is None or not self._is_ours(message):
            return
        if message.error is None:
            self.scheduler.loaded(message.number, time.monotonic())
        else:
            self.log.error("adapter not loaded", error=message.error)
            self.scheduler.lost(message.number, time.monotonic())

    def _pin(self, message: Pin) -> None:
        before = self.pinned
        kept = [adapter for adapter in before if adapter.digest in message.kept]
        self.pinned = (*[Adapter(*place) for place in message.places], *kept)
        self._repin(before, self.pinned)

    def _repin(self, before: tuple[Adapter, ...], now: tuple[Adapter, ...]) -> None:
        if self.scheduler is None:
            return
        for digest in {adapter.digest for adapter in before} - {adapter.digest for adapter in now}:
            self.scheduler.unpin(digest)
        for adapter in now:
            if not self.scheduler.pin(adapter, time.monotonic()):
                self.log.error("no room to pin an adapter", digest=adapter.digest.hex(), pages=adapter.pages)

    def _commit(self, message: StepDone) -> None:
        if self.scheduler is None or not self._is_ours(message):
            return
        begun, launched = time.thread_time(), max(1, self.scheduler.in_flight)
        self.commits.append(self.scheduler.commit(result_from_done(message), time.monotonic()))
        self.spent += time.thread_time() - begun
        self.step_seconds += message.seconds
        # From its launch until its results were back: the steps before it took their share of that.
        self.ahead = plans_ahead(self.config.lookahead, message.seconds / launched, beside=self.beside)
        self._launch()  # before the results are told: the executor must not wait for that
        self.host_seconds.append(self.spent)
        self.spent = 0.0

    def after(self) -> None:
        if self.scheduler is None:
            return
        self.scheduler.expire(time.monotonic())
        self._launch()
        while self.commits:
            commit = self.commits.popleft()
            self._emit(commit, commit.ended)
        # Streams that begin are told of with their first tokens, or their end: a message for each would count as one that is far ahead.
        if ended := self.scheduler.take_ended():
            self._emit(None, ended)

    def wake_in(self) -> float:
        busy = self.scheduler is not None and (self.scheduler.waiting or self.scheduler.running)
        return 0.05 if busy else HEARTBEAT_S  # deadlines pass although no result arrives

    def _launch(self) -> None:
        scheduler = self.scheduler
        if max(emitted - journaled for emitted, journaled in zip(self.emitted, self.journaled, strict=True)) > UNJOURNALED:
            return
        while scheduler is not None and scheduler.in_flight <= self.ahead:
            begun = time.thread_time()
            plan = scheduler.plan(time.monotonic())
            self.spent += time.thread_time() - begun
            for load in scheduler.take_loads():
                self.loads += 1
                self.mail.send(EXECUTOR, Load(self.post.incarnation, self.executor, load.number, load.adapter.path, load.pages))
            if plan is None:
                return
            self.mail.send(EXECUTOR, step_from_plan(plan, self.post.incarnation, self.executor))

    def _emit(self, commit: Commit | None, ended: list[Ended]) -> None:
        """One message to each detokenizer that has news: streams that begin, tokens, streams that end, in this order."""
        opens, self.opens = self.opens, []
        ends = [_end(end) for end in ended]
        count = self.config.detokenizers
        details = self._details(commit)
        for index in range(count):

            def mine(rows: Iterable[Any], index: int = index) -> tuple[Any, ...]:
                return tuple([row for row in rows if detokenizer_of(row[0], count) == index])

            handles = attempts = offsets = ids = b""
            at: dict[int, int] = {}  # row of the step's results → row of this message
            if commit is not None:
                chosen = detokenizer_of(commit.handles, count) == index if count > 1 else slice(None)
                handles, attempts = commit.handles[chosen].tobytes(), commit.attempts[chosen].tobytes()
                offsets, ids = commit.offsets[chosen].tobytes(), commit.ids[chosen].tobytes()
                if details:
                    at = {row: position for position, row in enumerate(commit.rows[chosen].tolist())}
            prompts = mine(commit.prompt_logprobs) if commit is not None else ()
            self._send(
                index, mine(opens), handles, attempts, offsets, ids, mine(ends),
                tuple([(at[row], token) for row, token in details if row in at]),
                tuple([(handle, attempt, token_rows(top)) for handle, attempt, top in prompts]),
            )  # fmt: skip

    def _send(self, index: int, opens: tuple[Any, ...], handles: bytes, *more: Any) -> None:
        ends = more[3]
        if opens or handles or ends:
            self.emitted[index] += 1
            self.mail.send(("detokenizer", index), Emitted(self.post.incarnation, self.emitted[index], opens, handles, *more))

    @staticmethod
    def _details(commit: Commit | None) -> list[tuple[int, list[Any]]]:
        if commit is None or commit.logprobs is None:
            return []
        return list(zip(commit.logprobs.rows.tolist(), token_rows(commit.logprobs), strict=True))

    def load(self) -> dict[str, Any]:
        scheduler = self.scheduler
        if scheduler is None:
            return {}
        return {
            **asdict(scheduler.counters),
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "blocks_total": scheduler.config.blocks,
            "blocks_free": scheduler.pool.available,
            "step_seconds": self.step_seconds,
            "adapters": scheduler.adapters(),
            "adapter_loads": self.loads,
            **self._host_percentiles(),
        }

    def _host_percentiles(self) -> dict[str, float]:
        """Of the CPU time of `plan` and `commit` together, over the last steps."""
        ordered = sorted(self.host_seconds) or [0.0]
        return {"host_p50_s": ordered[len(ordered) // 2], "host_p99_s": ordered[len(ordered) * 99 // 100]}


def plans_ahead(asked: int | None, seconds: float, *, beside: bool) -> int:
    """How many plans to send before the results of earlier ones are back, where a step takes so long. `beside`: steps run while the
    host launches the next one. With one, a device then waits wherever a round of messages takes longer than a step does; with more,
    requests that arrive wait for more steps."""
    if asked is not None:
        return asked
    return MOST_AHEAD if beside and seconds < SHORT_S else 1


def detokenizer_of(handle: Handles, count: int) -> Handles:
    """Which detokenizer has a stream, for good; of one handle or of a column of them."""
    return (handle & 0xFFFFFFFF) % count


def _end(end: Ended) -> tuple[Any, ...]:
    facts = {
        "cached_tokens": end.cached_tokens,
        "preemptions": end.preemptions,
        "queue_s": end.queue_s,
        "prefill_s": end.prefill_s,
        "decode_s": end.decode_s,
    }
    return end.handle, end.attempt, end.reason, facts
