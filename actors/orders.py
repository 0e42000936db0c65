"""What operators may order: who may, and which actor they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.actors.errors import Refusal, bad
from penstock.actors.messages import Order
from penstock.actors.protocol import Control

if TYPE_CHECKING:
    from penstock.actors.config import EngineConfig

ORDERS = ("drain", "restart")


def read_order(message: Control, user: str, by: str, config: EngineConfig, vitals: tuple[Any, ...]) -> Order:
    """The order for the supervisor. `vitals` are its rows of the actors: none in the first moments of a gateway, and then an order passes
    whose actor is not known, which the supervisor ignores. Raises `Refusal`."""
    check_operator(user, config)
    if message.order not in ORDERS:
        raise bad("order", message.order, "one of " + ", ".join(ORDERS))
    if message.order == "drain":
        return Order("drain", "", 0, 0, by)
    kind, index = read_name(message.actor)
    names = [name_of(row[0], row[1]) for row in vitals]
    if names and name_of(kind, index) not in names:
        raise bad("actor", message.actor, "one of " + ", ".join(names))
    return Order("restart", kind, index, message.incarnation, by)


def check_operator(user: str, config: EngineConfig) -> None:
    """Without keys, everyone is one. Raises `Refusal`."""
    if config.secret_key is not None and user not in map(str.strip, (config.operators or "").split(",")):
        raise Refusal("unauthorized", f"{user} is not an operator of this engine", field="operators", value=user)


def name_of(kind: str, index: int) -> str:
    return kind if index == 0 else f"{kind}/{index}"


def read_name(name: str) -> tuple[str, int]:
    """The kind and index of `tokenizer/1`; without an index, the first of its kind. An index that is no number is nobody's."""
    kind, slash, index = name.partition("/")
    return kind, int(index) if index.isdecimal() and len(index) < 9 else -1 if slash else 0
