"""The executor actor: plans in, sampled ids out. It alone opens the device."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Any

import zmq

from penstock.actors.actor import HEARTBEAT_S, SCHEDULER, Actor
from penstock.actors.columns import done_from_result, int32, plan_from_step
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.actors.mailbox import open_outbox
from penstock.actors.messages import INSIDE, Step, StepDone
from penstock.engine.model.spec import ModelError
from penstock.engine.open import open_mock, open_model
from penstock.engine.plan import Pending, StepResult, StepRunner

IDLE_S = 0.05  # without a step: then there is time to prepare for others


class ExecutorActor(Actor):
    kind = "executor"
    results: Results | None = None

    def start(self) -> dict[str, Any]:
        self.handlers |= {Step: self._step, StepDone: self._check}
        self.awaits[Step] = lambda step: ((SCHEDULER, step.scheduler),)
        self.runner, facts = self._open_runner()
        self.preparing, self.asked = True, 0.0  # whether there may be something to prepare, and when the last step came
        if facts["device"] == "cuda":
            self.results = Results(self.context, self.post.address)
        return facts

    def _open_runner(self) -> tuple[StepRunner, dict[str, Any]]:
        mock = self.config.executor == "mock"
        try:
            return open_mock(**opening(self.config), mock_step=self.config.mock_step) if mock else open_model(**opening(self.config))
        except ModelError as error:
            raise Refusal("model_error", str(error), field="model", value=self.config.model, actor=self.kind) from error

    def _step(self, step: Step) -> None:
        scheduler = self.peers.get(SCHEDULER)
        if step.executor != self.post.incarnation or scheduler is None or step.scheduler != scheduler.incarnation:
            return  # from a scheduler that is no more
        self.asked = time.monotonic()
        pending = self.runner.launch(plan_from_step(step))
        if self.results is not None:
            self.results.put(scheduler.address, step, pending)
        else:
            done = done_from_result(pending.result(), step.scheduler, step.executor)
            self._check(done)
            self.mail.send(SCHEDULER, done)

    def after(self) -> None:
        if self.preparing and not self.waiting and time.monotonic() - self.asked > IDLE_S:
            self.preparing = self.runner.prepare()

    def wake_in(self) -> float:
        return IDLE_S if self.preparing else HEARTBEAT_S

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
        """`in_flight`: a step that never ends shows, although this loop goes on."""
        return {"in_flight": self.waiting} if self.results is not None else {}

    def finish(self) -> None:
        if self.results is not None:
            self.results.close()


class Results:
    """A thread that waits for each step's results in turn and sends them, while the main thread launches the next step. A failed step
    goes to this actor itself, at `home`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], home: str) -> None:
        self._context, self._home = context, home
        self._put = self._done = 0
        self._queue: SimpleQueue[tuple[str, Step, Pending] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._put - self._done

    def put(self, address: str, step: Step, pending: Pending) -> None:
        self._put += 1
        self._queue.put((address, step, pending))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        address, outbox = "", None
        while (item := self._queue.get()) is not None:
            target, step, pending = item
            try:
                result = pending.result()
            except Exception as error:  # noqa: BLE001  whatever it was, the actor must hear of it: nobody watches this thread
                result = StepResult(step.step, int32(b""), error=f"{type(error).__name__}: {error}")
            self._done += 1
            done = done_from_result(result, step.scheduler, step.executor)
            if done.error is not None:
                target = self._home
            if target != address or outbox is None:
                if outbox is not None:
                    outbox.close(linger=0)
                address, outbox = target, open_outbox(self._context, target)
            outbox.send(INSIDE.encode(done), zmq.NOBLOCK)
        if outbox is not None:
            outbox.close(linger=0)


def opening(config: EngineConfig) -> dict[str, Any]:
    """The settings that concern the engine proper, by the names that `engine.open` gives them."""
    names = (
        "model", "weights", "dtype", "device", "max_model_len", "memory", "block_size", "blocks", "max_running", "token_budget",
        "lookahead", "threads", "seed", "decoder", "graphs", "deterministic",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}
