"""The desk: what clients ask about the engine and their requests, and what operators order about adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.actors.messages import Manage, Managed, Vitals
from penstock.actors.orders import check_operator
from penstock.actors.protocol import Adapters, Control, List, Listing, Report, Status
from penstock.actors.reception import Reception
from penstock.actors.resolve import Model
from penstock.actors.sessions import Session
from penstock.actors.status import list_adapters, list_requests, status_report


@dataclass(frozen=True, slots=True)
class State:
    """Of the gateway: `name` is starting, ready or draining; `counts` are sums since it began."""

    name: str
    model: Model | None
    counts: dict[str, int]


class Desk:
    """Answers by way of `reception`. `send` is to the adapters actor, `state` tells the gateway's."""

    def __init__(
        self, config: EngineConfig, incarnation: int, reception: Reception, send: Callable[[Manage], object], state: Callable[[], State]
    ) -> None:
        self.config = config
        self.vitals: tuple[Any, ...] = ()  # the supervisor's rows of the actors
        self._reception, self._send, self._state = reception, send, state
        self._orders: dict[int, tuple[Session, int, Manage]] = {}  # that the adapters actor has, and who is to hear how they went
        self._numbers = incarnation << 32

    def keep_vitals(self, message: Vitals) -> None:
        self.vitals = message.actors

    def report(self, message: Status | Control) -> Report:
        state, sessions = self._state(), self._reception.sessions
        return Report(message.query, status_report(state.name, state.model, state.counts, len(sessions), self.vitals))

    def status(self, session: Session, message: Status | Control) -> None:
        self._reception.answer(session, self.report(message))

    def list(self, session: Session, message: List) -> None:
        self._reception.answer(session, Listing(message.query, tuple(list_requests(session, time.monotonic()))))

    def adapters(self, session: Session, message: Adapters) -> None:
        """The answer comes when it is done."""
        try:
            if message.order != "list":
                check_operator(session.user, self.config)
            model = self._state().model
            if model is None or not model.adapter_pages:
                raise Refusal("unknown_adapter", "this engine serves no adapters", field="adapter", value=message.name[:120])
        except Refusal as refusal:
            self._reception.answer(session, Report(message.query, {"error": refusal.fault.to_wire()}))
            return
        self._numbers += 1
        order = Manage(self._numbers, message.order, message.name, message.source, message.token)
        self._orders[self._numbers] = session, message.query, order
        self._send(order)

    def managed(self, message: Managed) -> None:
        session, query, _ = self._orders.pop(message.job, (None, 0, None))
        if session is not None and session in self._reception.sessions:
            rows = list_adapters(message.adapters, self.vitals)
            answer = {"error": message.error} if message.error is not None else {"adapters": rows}
            self._reception.answer(session, Report(query, answer))

    def order_again(self) -> None:
        """The adapters actor was replaced. An order that it cannot bear leaves with whoever gave it."""
        self._orders = {number: one for number, one in self._orders.items() if one[0] in self._reception.sessions}
        for _, _, order in self._orders.values():
            self._send(order)
