"""What a request asks for: an adapter by its name or source, or several merged by a recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from penstock.engine.params import InvalidParameter

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
MAJORITIES = ("total", "frequency")
MOST_PARTS = 16
LARGEST_WEIGHT = 1e3
LONGEST = 4096  # characters of a name or a source


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to merge: `weights` are those of the adapters, in their order, any sign. `density` is the share of each matrix that is kept, the
    largest values (ties) or random ones (dare); the others are dropped. `majority` says how a sign is elected (ties): by the sum of the
    values or by their number. Raises `InvalidParameter`."""

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    majority: str = "total"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidParameter("method", self.method, f"one of {', '.join(METHODS)}")
        if not isinstance(self.weights, tuple | list) or not 1 <= len(self.weights) <= MOST_PARTS:
            raise InvalidParameter("weights", self.weights, f"from 1 to {MOST_PARTS} numbers")
        for weight in self.weights:
            if not _number(weight) or not abs(weight) <= LARGEST_WEIGHT:
                raise InvalidParameter("weights", weight, f"a number from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}")
        if not _number(self.density) or not 0 < self.density <= 1:
            raise InvalidParameter("density", self.density, "a number above 0 and at most 1")
        if self.method == "linear" and self.density != 1:
            raise InvalidParameter("density", self.density, "left out with linear, which drops nothing")
        if self.majority not in MAJORITIES:
            raise InvalidParameter("majority", self.majority, f"one of {', '.join(MAJORITIES)}")

    def digest(self, parts: Sequence[str]) -> str:
        """Of what comes of adapters with these digests: BLAKE2b of 256 bits, in hexadecimal."""
        values = [self.method, [float(weight) for weight in self.weights], float(self.density), self.majority, list(parts)]
        return hashlib.blake2b(json.dumps(values).encode(), digest_size=32).hexdigest()


@dataclass(frozen=True, slots=True)
class Wish:
    """`names` are names that the engine knows, or sources; one, or with a recipe as many as that has weights."""

    names: tuple[str, ...]
    recipe: Recipe | None = None

    @property
    def text(self) -> str:
        """For people."""
        return self.names[0] if self.recipe is None else f"{self.recipe.method} of {', '.join(self.names)}"

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """A text is a name. A map has `name`, or `merge` (names), and then it may have `weights` (1 each), `method` (linear), `density` and
        `majority`. Raises `InvalidParameter`."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise InvalidParameter("adapter", value, "a name, or a map with name or merge")
        known = {"name"} if "name" in value else {"merge", "weights", "method", "density", "majority"}
        for key in value:
            if key not in known:
                raise InvalidParameter("adapter", key, f"one of {', '.join(sorted(known))}")
        if "name" in value:
            return cls((_name("adapter.name", value["name"]),))
        names = value.get("merge")
        if not isinstance(names, list | tuple) or not 1 <= len(names) <= MOST_PARTS:
            raise InvalidParameter("adapter.merge", names, f"a list of 1 to {MOST_PARTS} names")
        checked = tuple(_name("adapter.merge", name) for name in names)
        weights = value.get("weights", (1.0,) * len(names))
        recipe = Recipe(
            value.get("method", "linear"), tuple(weights) if isinstance(weights, list | tuple) else weights, value.get("density", 1.0),
            value.get("majority", "total"),
        )  # fmt: skip
        if len(recipe.weights) != len(checked):
            raise InvalidParameter("adapter.weights", weights, f"as many as there are names: {len(checked)}")
        return cls(checked, recipe)

    def to_wire(self) -> dict[str, Any]:
        if self.recipe is None:
            return {"name": self.names[0]}
        recipe = self.recipe
        return {
            "merge": self.names, "weights": recipe.weights, "method": recipe.method, "density": recipe.density, "majority": recipe.majority,
        }  # fmt: skip


def _name(field: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST:
        raise InvalidParameter(field, value, f"a text of 1 to {LONGEST} characters")
    return value


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
