"""Orders to the engine: what is asked, and which answer says that it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.actors.orders import name_of, read_name
from penstock.actors.protocol import Adapters, Control, Status

EVERY_S = 0.05  # between looks at an actor that is being replaced


def drain(query: int) -> Control:
    return Control(query, "drain", "", 0)


def adapter_order(order: str, name: str = "", source: str | None = None, token: str | None = None) -> Callable[[int], Adapters]:
    """The question for an order about adapters."""
    return lambda query: Adapters(query, order, name, source, token)


def row_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Of one adapter, in the answer."""
    return next((dict(row) for row in report["adapters"] if row["name"] == name), {"name": name})


class Restart:
    """Replacing one actor. The order names the start of it that is to end, so it does no harm to say it again, and it is: it may be lost
    together with the gateway that took it."""

    def __init__(self, actor: str) -> None:
        self.actor = actor
        self._name = name_of(*read_name(actor))
        self._incarnation: int | None = None  # of the one to replace, once that is known; 0 if there is none: that is for the engine to say

    def question(self, query: int) -> Status | Control:
        """What to ask next."""
        return Status(query) if self._incarnation is None else Control(query, "restart", self.actor, self._incarnation)

    def take(self, report: dict[str, Any]) -> dict[str, Any] | None:
        """Take an answer. Returns the actor's row of the report once there is a new one that is ready."""
        actors = report.get("actors", ())  # none in the first moments of a gateway
        row = next((row for row in actors if name_of(row["kind"], row["index"]) == self._name), None)
        if self._incarnation is None:
            self._incarnation = (row["incarnation"] if row is not None else 0) if actors else None
        elif row is not None and row["incarnation"] > self._incarnation and row["state"] == "ready":
            return dict(row) if self._incarnation else None
        return None
