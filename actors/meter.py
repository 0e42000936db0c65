"""How much a connection may send: a bucket of messages and one of bytes, each filled at a rate."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

BURST_S = 4.0  # seconds' worth that may come at once
DEBT_S = 16.0  # seconds' worth beyond that which is still read and answered

Verdict = Literal["fine", "too much", "far too much"]


@dataclass(slots=True)
class _Bucket:
    messages: float  # seconds' worth of each that is left; below 0 is debt
    volume: float
    at: float
    warned: bool = False


class Meter:
    """Judges each message of any connection. `messages` and `volume` (bytes) are rates, a second. Remembers the `most` connections that
    were heard last: one that is forgotten begins anew."""

    def __init__(self, messages: float, volume: float, most: int) -> None:
        self._messages, self._volume, self._most = messages, volume, most
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def judge(self, connection: bytes, size: int, now: float) -> Verdict:
        """A message of `size` bytes came. What is far too much does not count: its sender is heard again as soon as any other."""
        bucket = self._buckets.get(connection)
        if bucket is None:
            if len(self._buckets) >= self._most:
                self._buckets.popitem(last=False)
            bucket = self._buckets[connection] = _Bucket(BURST_S, BURST_S, now)
        else:
            self._buckets.move_to_end(connection)
        passed, bucket.at = now - bucket.at, now
        cost = 1 / self._messages, size / self._volume
        messages, volume = min(BURST_S, bucket.messages + passed), min(BURST_S, bucket.volume + passed)
        least = min(messages - cost[0], volume - cost[1])
        if least < -DEBT_S:
            bucket.messages, bucket.volume = messages, volume
            return "far too much"
        bucket.messages, bucket.volume = messages - cost[0], volume - cost[1]
        bucket.warned = bucket.warned and least < 0
        return "too much" if least < 0 else "fine"

    def warn(self, connection: bytes) -> bool:
        """Whether it is still to be told, once, that it is not being read."""
        bucket = self._buckets[connection]
        warned, bucket.warned = bucket.warned, True
        return not warned

    def wait(self, connection: bytes) -> float:
        """Seconds until a connection that sent too much is out of debt."""
        bucket = self._buckets.get(connection)
        return 0.0 if bucket is None else max(0.0, -min(bucket.messages, bucket.volume))
