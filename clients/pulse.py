"""Signs of life in both directions: when to renew the lease, and when the engine has been silent for too long."""

from __future__ import annotations

from typing import Literal

_SHORTEST = 0.03  # seconds; a lease below that would be all renewals


class Pulse:
    """Times are seconds on the driver's monotonic clock. `busy` says whether something is expected of the engine."""

    __slots__ = ("_probed", "heard", "lease", "said")

    def __init__(self, now: float) -> None:
        self.lease = 10.0
        self.said = self.heard = now
        self._probed = now

    def start(self, lease: float, now: float) -> None:
        self.lease, self.said, self.heard = max(lease, _SHORTEST), now, now

    def due(self, busy: bool) -> float:
        renew = self.said + self.lease / 3
        return min(renew, max(self.heard, self._probed) + self.lease) if busy else renew

    def beat(self, now: float, busy: bool) -> Literal["probe", "renew", "dead"] | None:
        """What to do now. Silence may mean a long queue, so an engine is given up only if it does not even answer a question. The
        question comes first also for a client that slept itself: the answer may be waiting unread."""
        if busy and now >= self.heard + self.lease:
            if self._probed <= self.heard:
                self._probed = now
                return "probe"
            if now >= self._probed + self.lease:
                return "dead"
        return "renew" if now >= self.said + self.lease / 3 else None
