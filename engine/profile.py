"""A trace of some steps in the middle of what an executor runs: torch's profiler, started and stopped between two of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 64  # at most: enough to see, and a file that can still be opened
STEP = "penstock step"  # what a trace calls the host's work for one


class StepProfile:
    """Traces up to `STEPS` launches into the file `path`, gzipped if that ends in .gz, once `after` query tokens have been run."""

    def __init__(self, path: str, after: int, device: torch.device) -> None:
        self.path, self.left = path, after
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._running: profile | None = None
        self._steps = 0
        with profile(activities=self._activities):  # the first takes seconds to begin: now, and not while streams wait
            torch.ones(1, device=device).add_(1)

    def step(self, tokens: int) -> AbstractContextManager[object]:
        """Around the launch of a step of so many query tokens."""
        if self._steps == 0 and self.left <= 0:
            self._running = profile(activities=self._activities)
            self._running.start()
        self.left -= tokens
        if self._running is None:
            return nullcontext()
        self._steps += 1
        return record_function(STEP)

    @property
    def running(self) -> bool:
        return self._running is not None

    @property
    def full(self) -> bool:
        return self._steps >= STEPS

    def close(self) -> None:
        """Write the file, if there is a trace. Raises `OSError` or `RuntimeError` if it cannot be written."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()
            running.export_chrome_trace(self.path)
