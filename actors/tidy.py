"""When an actor collects garbage: while it has nothing to do, because a collection pauses every stream; or when there may be much of it.

An actor's process turns Python's own collections off. References that form no cycle are freed at once all the same, and hardly anything
here forms one; what lived when the actor began is frozen, and never looked at.
"""

from __future__ import annotations

import gc

IDLE, BUSY = 1000, 200_000  # objects made and not freed since the last collection, from which there is one


def tidy(*, idle: bool) -> None:
    """Collect, if it is time to. Does nothing where Python does it by itself."""
    if not gc.isenabled() and gc.get_count()[0] > (IDLE if idle else BUSY):
        gc.collect()
