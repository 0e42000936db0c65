"""The executor actor: plans in, sampled ids out. It alone opens the device."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import zmq

from penstock.actors.actor import HEARTBEAT_S, SCHEDULER, Actor, Peer
from penstock.actors.columns import done_from_result, int32, plan_from_step
from penstock.actors.config import EngineConfig
from penstock.actors.courier import Courier
from penstock.actors.errors import Refusal
from penstock.actors.library import serves_adapters
from penstock.actors.messages import Load, Loaded, Step, StepDone
from penstock.engine.model.spec import ModelError
from penstock.engine.open import open_mock, open_model
from penstock.engine.plan import Pending, StepResult, StepRunner
from penstock.engine.steptimes import Launch, StepTimes

if TYPE_CHECKING:
    from penstock.engine.profile import StepProfile

IDLE_S = 0.05  # without a step: then there is time to prepare for others
OVER_S = 1.0  # without a step: then no more will come that a trace waits for


class ExecutorActor(Actor):
    kind = "executor"
    results: Results | None = None
    loads: Courier | None = None
    profile: StepProfile | None = None

    def start(self) -> dict[str, Any]:
        self.handlers |= {Step: self._step, StepDone: self._check, Load: self._load}
        self.awaits[Step] = self.awaits[Load] = lambda message: ((SCHEDULER, message.scheduler),)
        self.runner, facts = self._open_runner()
        self.opening = facts.get("opening_s", {})
        self.times = StepTimes()
        self.profile = self._open_profile(facts["device"])
        self.preparing, self.asked = True, 0.0  # whether there may be something to prepare, and when the last step came
        if facts["device"] == "cuda":
            self.results = Results(self.context, self.post.address, self.times)
        self.loads = Courier(self.context)  # of the thread that loads adapters
        return facts

    def _open_runner(self) -> tuple[StepRunner, dict[str, Any]]:
        try:
            if self.config.executor == "mock":
                return open_mock(**opening(self.config), mock_step=self.config.mock_step)
            return open_model(**opening(self.config), values=self.post.values)
        except ModelError as error:
            raise Refusal("model_error", str(error), field="model", value=self.config.model, actor=self.kind) from error

    def _step(self, step: Step) -> None:
        if (scheduler := self._sender(step)) is None:
            return
        self.preparing, self.asked = True, time.monotonic()  # for steps like this one
        plan, flying, begun = plan_from_step(step), self.waiting > 0, time.perf_counter()
        if self.profile is None:
            pending = self.runner.launch(plan)
        else:
            with self.profile.step(plan.query_tokens):
                pending = self.runner.launch(plan)
            if self.profile.full:
                self._close_profile()
        launch = self.times.launched(plan, begun, time.perf_counter(), flying=flying)
        if self.results is not None:
            self.results.put(Flight(scheduler.address, step, pending, launch))
        else:
            result = pending.result()
            self.times.done(launch, result, time.perf_counter())
            done = done_from_result(result, step.scheduler, step.executor)
            self._check(done)
            self.mail.send(SCHEDULER, done)

    def _sender(self, message: Step | Load) -> Peer | None:
        """The scheduler that is there now, if it has sent this to this executor."""
        scheduler = self.peers.get(SCHEDULER)
        ours = scheduler is not None and (message.scheduler, message.executor) == (scheduler.incarnation, self.post.incarnation)
        return scheduler if ours else None

    def _load(self, load: Load) -> None:
        if (scheduler := self._sender(load)) is None:
            return
        courier, address = self.loads, scheduler.address

        def tell(error: str | None) -> None:
            if courier is not None:
                courier.send(address, Loaded(load.scheduler, load.executor, load.number, error))

        self.runner.load(load.path, load.pages, tell)

    def _rests(self, seconds: float) -> bool:
        """Whether for so long no step has come, and none is in flight."""
        return not self.waiting and time.monotonic() - self.asked > seconds

    def _open_profile(self, device: str) -> StepProfile | None:
        if self.config.profile is None:
            return None
        import torch

        from penstock.engine.profile import StepProfile

        return StepProfile(self.config.profile, self.config.profile_after, torch.device(device))

    def _close_profile(self) -> None:
        profile, self.profile = self.profile, None
        if profile is not None:
            try:
                profile.close()
                self.log.info("profiled", file=profile.path)
            except (OSError, RuntimeError) as error:
                self.log.error("profile lost", error=str(error))

    def after(self) -> None:
        if self.profile is not None and self.profile.running and self._rests(OVER_S):
            self._close_profile()
        if self.preparing and self._rests(IDLE_S):
            self.preparing = self.runner.prepare()

    def wake_in(self) -> float:
        if not self.preparing:
            return HEARTBEAT_S
        return 0.0 if self._rests(IDLE_S) else IDLE_S

    @property
    def waiting(self) -> int:
        """Launched steps whose results another thread awaits."""
        return 0 if self.results is None else self.results.waiting

    def _check(self, done: StepDone) -> None:
        """A step that failed leaves its slots undefined: this incarnation ends, and the requests are handed to the next one."""
        if done.error is not None:
            code = "out_of_memory" if done.error.startswith("OutOfMemoryError") else "engine_fault"
            raise Refusal(code, f"step {done.step}: {done.error}", actor=self.kind)

    def load(self) -> dict[str, Any]:
        """`in_flight`: a step that never ends shows, although this loop goes on. `preparing`: it still captures graphs when it rests.
        `opening_s`: what opening the model took time for. The rest is `StepTimes.figures` and the runner's."""
        mine = {"in_flight": self.waiting, "preparing": self.preparing, "opening_s": self.opening}
        return mine | self.times.figures() | self.runner.figures()

    def finish(self) -> None:
        self._close_profile()
        if self.results is not None:
            self.results.close()
        if self.loads is not None:
            self.runner.close()
            self.loads.close()


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A launched step, and the `address` that awaits its results."""

    address: str
    step: Step
    pending: Pending
    launch: Launch


class Results:
    """A thread that waits for each step's results in turn and sends them, while the main thread launches the next step. A failed step
    goes to this actor itself, at `home`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], home: str, times: StepTimes) -> None:
        self._context, self._home, self._times = context, home, times
        self._put = self._done = 0
        self._queue: SimpleQueue[Flight | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._put - self._done

    def put(self, flight: Flight) -> None:
        self._put += 1
        self._queue.put(flight)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        courier = Courier(self._context)
        while (flight := self._queue.get()) is not None:
            step = flight.step
            try:
                result = flight.pending.result()
                self._times.done(flight.launch, result, time.perf_counter())
            except Exception as error:  # noqa: BLE001  whatever it was, the actor must hear of it: nobody watches this thread
                result = StepResult(step.step, int32(b""), error=f"{type(error).__name__}: {error}")
            self._done += 1
            done = done_from_result(result, step.scheduler, step.executor)
            courier.send(flight.address if done.error is None else self._home, done)
        courier.close()


def opening(config: EngineConfig) -> dict[str, Any]:
    """The settings that concern the engine proper, by the names that `engine.open` gives them."""
    names = (
        "model", "weights", "dtype", "kv_dtype", "device", "max_model_len", "memory", "block_size", "blocks", "max_running",
        "token_budget", "lookahead", "threads", "seed", "decoder", "graphs", "deterministic", "time_steps", "adapter_host",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names} | {"adapter_pages": config.adapter_pages if serves_adapters(config) else 0}
