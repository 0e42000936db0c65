"""How much a connection may send. A message costs the time in which the allowed rates would have brought it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

BURST_S = 4.0  # seconds' worth that may come at once
EASY_S = 0.002  # that any message may take
SHARE = 0.25  # of the gateway's time that one connection may have for others
FAR = 4  # times the rate, and the burst: what is beyond is not even read

Verdict = Literal["fine", "too much", "far too much"]


@dataclass(slots=True)
class _Account:
    at: float
    left: float = BURST_S  # seconds' worth that may still come now
    far: float = FAR * BURST_S  # the same, counting also what was too much
    cost: float = 0.0  # of the last message
    turn: float = 0.0  # until when turns are given to messages that were too much
    warned: bool = False


class Meter:
    """Judges each message of any connection. `messages` and `volume` (bytes) are rates, a second. Remembers the `most` connections that
    were heard last: one that is forgotten begins anew."""

    def __init__(self, messages: float, volume: float, most: int) -> None:
        self._messages, self._volume, self._most = messages, volume, most
        self._accounts: OrderedDict[bytes, _Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def judge(self, connection: bytes, size: int, now: float) -> Verdict:
        """A message of `size` bytes came. Only what is fine uses up the rate, so whoever sends too much still gets that much done."""
        account = self._accounts.get(connection)
        if account is None:
            if len(self._accounts) >= self._most:
                self._accounts.popitem(last=False)
            account = self._accounts[connection] = _Account(now)
        else:
            self._accounts.move_to_end(connection)
        passed, account.at = now - account.at, now
        account.cost = cost = max(1 / self._messages, size / self._volume)
        account.left, account.far = min(BURST_S, account.left + passed), min(FAR * BURST_S, account.far + FAR * passed)
        if account.far < cost:
            return "far too much"
        account.far -= cost
        if account.left < cost:
            return "too much"
        account.left -= cost
        account.warned = False
        return "fine"

    def spend(self, connection: bytes, seconds: float) -> None:
        """To deal with the last message took so much CPU time. One that is hard to read costs more than the rates say."""
        account = self._accounts.get(connection)
        if account is not None and seconds > EASY_S:
            account.left -= seconds / SHARE
            account.far -= seconds / SHARE

    def turn(self, connection: bytes) -> float:
        """Seconds until the last message of a connection would be fine. Each that is too much gets a turn of its own, so that those that
        are sent again do not all come at once."""
        account = self._accounts[connection]
        account.turn = max(account.turn, account.at + max(0.0, account.cost - account.left)) + account.cost
        return account.turn - account.at

    def warn(self, connection: bytes) -> bool:
        """Whether a connection that is not read any more is still to be told: once."""
        account = self._accounts[connection]
        warned, account.warned = account.warned, True
        return not warned
