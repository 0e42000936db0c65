"""Turns: how many tokens of a step each tenant may have while several are busy.

A step takes as long for everyone as its longest part, so a tenant is hurt by what others compute beside it, even if nothing that it
asked for had to wait. Therefore each has a credit of tokens, which grows with every step by what the busiest of the others was given,
and an eighth (`GENEROSITY`) for the moments at which they differ. That is max-min fair: who wants little gets it at once, and sets the
pace for those who want everything; those share what is left alike. At least `quantum` tokens are added, however little the others ask
for: about as many as a step takes on without becoming much longer, or else a single quiet stream would leave the device idle.

Nobody's credit matters while it is alone. A tenant counts as busy for `LINGER_S` after its last step: between two requests of a client
lies a round trip, and a step without limits begun in it would be what the second one waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from penstock.engine.stream import Stream

GENEROSITY = 8  # one part in so many
LINGER_S = 0.1


class Allowance:
    """What is left of each tenant's credit in one step, at one priority. `fresh` is that of a tenant that was not seen lately."""

    __slots__ = ("_fresh", "_left", "hungry", "used")

    def __init__(self, credits: Mapping[str, int], fresh: int) -> None:
        self._left, self._fresh = dict(credits), fresh
        self.used: dict[str, int] = {}
        self.hungry: set[str] = set()  # tenants that wanted more than they had

    def left(self, tenant: str) -> int:
        return self._left.get(tenant, self._fresh)

    def grant(self, tenant: str, wanted: int, most: int) -> int:
        """How many of `wanted` tokens a tenant gets, when the step has room for `most`."""
        left = self.left(tenant)
        granted = min(wanted, most, left)
        if left < min(wanted, most):
            self.hungry.add(tenant)
        self._left[tenant] = left - granted
        self.used[tenant] = self.used.get(tenant, 0) + granted
        return granted

    def spent(self) -> set[str]:
        """Tenants that get no more of this step."""
        return {tenant for tenant, left in self._left.items() if left <= 0}


class Turns:
    """The credits of one scheduler, by priority: priorities never share a turn. `quantum` 0 switches it off; `most` is the largest credit
    (a step), so that nobody saves up for longer."""

    __slots__ = ("_credits", "_seen", "most", "quantum")

    def __init__(self, quantum: int, most: int) -> None:
        self.quantum, self.most = quantum, most
        self._credits: dict[int, dict[str, int]] = {}
        self._seen: dict[int, dict[str, float]] = {}

    def begin(self, priority: int, running: Iterable[str], comer: str | None, now: float) -> Allowance | None:
        """What the tenants at this priority may have of the next step; None if there is no more than one of them. `comer` is the next that
        can be let in: one that waits and cannot be has nothing of it if others are held back."""
        if not self.quantum:
            return None
        seen = self._seen.setdefault(priority, {})
        credits = self._credits.setdefault(priority, {})
        for tenant in running:
            seen[tenant] = now
        for tenant in [tenant for tenant, when in seen.items() if now - when > LINGER_S]:
            del seen[tenant]
        for tenant in credits.keys() - seen.keys():
            del credits[tenant]
        if len(seen) + (comer is not None and comer not in seen) >= 2:
            return Allowance(credits, self.most)
        for tenant in seen:
            credits[tenant] = self.quantum  # whoever was alone had enough
        return None

    def end(self, priority: int, allowance: Allowance) -> None:
        """The step is planned: add to every credit for the next one. Those who wanted more than they had set no pace for each other."""
        credits, used = self._credits[priority], allowance.used
        first, second = sorted([0, 0, *used.values()])[-1:-3:-1]
        hungry = allowance.hungry
        for tenant in {**credits, **used}:
            mine = used.get(tenant, 0)
            most_other = first if mine < first else second
            grown = max(self.quantum, most_other + -(-most_other // GENEROSITY))
            if len(hungry) > (tenant in hungry):
                grown = max(grown, min(2 * mine, self.most // max(2, len(hungry))))
            credits[tenant] = min(self.most, allowance.left(tenant) + grown)


def who_yields(mine: list[Stream], richest: list[Stream], slot: bool, blocks: int, available: int) -> list[Stream]:
    """Which of the `richest` tenant's streams, given the newest first, yield to one more stream of a tenant that has `mine`, so that there
    is a slot, if it needs one, and `blocks` blocks, of which `available` are there. Nobody yields in vain, nor if its tenant would be
    left with less than the other one then has: the two would take turns for ever."""
    held = sum(len(stream.blocks) for stream in richest)
    wanted = sum(len(stream.blocks) for stream in mine) + blocks
    yielding = 0
    if slot:
        if len(richest) < len(mine) + 2:
            return []
        yielding, available, held = 1, available + len(richest[0].blocks), held - len(richest[0].blocks)
    while available < blocks:
        size = len(richest[yielding].blocks) if yielding < len(richest) else 0
        if held - size < wanted or not size:
            return []
        yielding, available, held = yielding + 1, available + size, held - size
    return richest[:yielding]
