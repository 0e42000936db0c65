"""Who has how much open. Limits are for all together; a flood must not spend the part of who came later."""

from __future__ import annotations

RESERVE = 4  # a limit is exceeded by one part in so many, for tenants that have little


class Tally:
    """Open streams, and their prompt tokens, by tenant."""

    __slots__ = ("_of",)

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._of)

    def of(self, tenant: str) -> tuple[int, int]:
        """Streams and tokens."""
        streams, tokens = self._of.get(tenant, (0, 0))
        return streams, tokens

    def add(self, tenant: str, streams: int, tokens: int) -> None:
        held = self._of.setdefault(tenant, [0, 0])
        held[0] += streams
        held[1] += tokens

    def remove(self, tenant: str, streams: int, tokens: int) -> None:
        """What was added."""
        self.add(tenant, -streams, -tokens)
        if not any(self._of[tenant]):
            del self._of[tenant]


def fits(all_held: int, mine: int, more: int, limit: int, tenants: int) -> bool:
    """Whether a tenant that has `mine` of `all_held` may have `more`. Up to the limit anybody may; a quarter beyond it is for those who
    have no more than their even share of that quarter. `tenants` are all that have something open, this one included."""
    if all_held + more <= limit:
        return True
    reserve = limit // RESERVE
    return all_held + more <= limit + reserve and mine + more <= reserve // max(1, tenants)
