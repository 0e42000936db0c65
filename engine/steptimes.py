"""What the steps of an executor took since it last rested: on the host to launch, from one to the next, and if it is measured, on the
device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.engine.plan import Float32, StepPlan, StepResult

LAST = 4096  # steps that percentiles are over, at most
REST_S = 1.0  # without a step: what comes then is something else, and is told apart
NEARLY = 0.9  # of the most decodes: a batch that is full, but for streams that have just ended


@dataclass(frozen=True, slots=True)
class Launch:
    """A step that was launched at `begun`, seconds. `decodes` are its rows if it has only decodes, else 0. `awaited`: when it came there
    was a step in flight, or it has decodes, whose streams were there before: had the device nothing to run then, it should have had."""

    begun: float
    decodes: int
    awaited: bool


class Ring:
    """The last numbers of many."""

    def __init__(self) -> None:
        self._values = np.zeros(LAST, np.float32)
        self._count = 0

    def add(self, value: float) -> None:
        self._values[self._count % LAST] = value
        self._count += 1

    @property
    def values(self) -> Float32:
        return self._values[: self._count]


class StepTimes:
    """`launched` may be called in one thread and `done` in another; each step is done in its turn."""

    def __init__(self) -> None:
        self._device_s = self._idle_s = 0.0
        self._before = 0.0
        self._clear()

    def _clear(self) -> None:
        self._launches, self._decodes, self._periods, self._device = Ring(), Ring(), Ring(), Ring()

    def launched(self, plan: StepPlan, begun: float, ended: float, *, flying: bool) -> Launch:
        """The host has launched a step, while others were still in flight or not."""
        if not flying and begun - self._before > REST_S:
            self._clear()
        self._launches.add(ended - begun)
        return Launch(begun, 0 if len(plan.tokens) else plan.decodes, flying or plan.decodes > 0)

    def done(self, launch: Launch, result: StepResult, now: float) -> None:
        """Its results are on the host."""
        if launch.decodes:
            self._periods.add(now - max(launch.begun, self._before))
            self._decodes.add(launch.decodes)
        self._before = now
        if result.device_seconds is not None:
            self._device.add(result.device_seconds)
            self._device_s += result.device_seconds
            self._idle_s += result.idle_seconds if launch.awaited else 0.0

    def figures(self) -> dict[str, float]:
        """Seconds of the host in `launch`, `launch_p50_s` and `launch_p99_s`. `decode_step_s`: the median step of those that have only
        decodes and nearly as many as any of them, `decode_rows`; a step begins when the one before it is done, or when it is launched if
        that is later. If steps are timed on the device, the median there, `device_step_p50_s`, and sums since the start: `device_s`, and
        `idle_s` in which it had no step to run although there were streams."""
        found: dict[str, float] = {}
        if len(launches := self._launches.values):
            found |= {"launch_p50_s": _percentile(launches, 50), "launch_p99_s": _percentile(launches, 99)}
        if len(decodes := self._decodes.values):
            most = float(decodes.max())
            periods = self._periods.values[: len(decodes)]  # `done` may have added one just now, whose rows are not there yet
            found |= {"decode_step_s": _percentile(periods[decodes >= NEARLY * most], 50), "decode_rows": most}
        if len(device := self._device.values):
            found |= {"device_step_p50_s": _percentile(device, 50), "device_s": self._device_s, "idle_s": self._idle_s}
        return found


def _percentile(values: Float32, percent: int) -> float:
    """Nearest rank."""
    return float(np.sort(values)[len(values) * percent // 100])
