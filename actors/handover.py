"""Handing over: the one function that everything hangs on.

`give` raises a stream's attempt, then reads the journal, and gives the value to the scheduler. The first submission, a restarted
executor, a lost row and a resumed client are all the same call. A row that comes back counts only if its attempt is current and its
offset equals the journal's length; a later offset is a gap, and gives again.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from penstock.actors.columns import int64, sampler_to_wire
from penstock.actors.journal import Journal, Taken
from penstock.actors.messages import Abort, Begin, Submit
from penstock.actors.request import Entry
from penstock.actors.suspects import Suspects


class HandOver:
    """Between the journal and the scheduler, to which `send` sends. With `isolate`, tenants share no cached prefixes."""

    def __init__(self, incarnation: int, send: Callable[[Any], object], *, isolate: bool) -> None:
        self.journal = Journal(incarnation)
        self.suspects: Suspects[Entry] = Suspects()
        self.scheduler = 0  # incarnation that said Begin
        self.again = 0  # streams that were given more than once, each time
        self._send = send
        # What it is changes no token: it only has to be the same for all requests.
        self._salt_key = secrets.token_bytes(32) if isolate else None

    def give(self, entry: Entry) -> None:
        """Give a stream's value to the scheduler, as it stands in the journal. Rows of earlier attempts no longer count."""
        if not self.scheduler or entry.handle not in self.journal.entries:
            return  # Begin will come; or it ended while others of the same message were handled
        if self.suspects.holds(entry):
            return
        entry.attempt += 1
        self.again += entry.attempt > 1
        request, resolved = entry.request, entry.request.value
        params = resolved.params
        decode = {"stop": params.stop, "skip_special_tokens": params.skip_special_tokens}
        if params.echo:
            decode["echo"] = entry.base == 0 and not entry.counts
        self._send(
            Submit(
                entry.handle, entry.attempt, resolved.prompt, entry.ids.tobytes(), resolved.limit, sampler_to_wire(entry.sampler), decode,
                resolved.priority, resolved.tenant, self._salt(resolved.tenant), request.deadline,
                request.queue_timeout if entry.attempt == 1 and not entry.ids else None,  # else it may have begun to run
                request.adapter,
            )
        )  # fmt: skip

    def begin(self, message: Begin) -> Entry | None:
        """A scheduler holds nothing. Returns the stream that is guilty of an executor's death, if one is found to be; when that is dealt
        with, everything in the journal is to be given again."""
        self.scheduler = message.incarnation
        flying = [entry for handle in int64(message.flying).tolist() if (entry := self.journal.entries.get(handle)) is not None]
        return self.suspects.crashed((entry, len(entry.ids)) for entry in flying) if flying else None

    def mend(self, taken: Taken) -> None:
        """Give again what has a gap, and whoever a token of another acquits; the ends in `taken` must have been dealt with."""
        for entry in taken.gaps:
            self.give(entry)
        if self.suspects.trial:
            for entry in self.suspects.cleared(lambda entry: len(entry.ids)):
                self.give(entry)

    def close(self, entry: Entry) -> None:
        """The stream has ended."""
        self.journal.close(entry)
        for other in self.suspects.forget(entry):
            self.give(other)

    def withdraw(self, entry: Entry) -> None:
        """The stream is to end, wherever it is."""
        self._send(Abort(array("q", [entry.handle]).tobytes(), array("i", [0]).tobytes()))
        self.close(entry)

    def _salt(self, tenant: str) -> bytes:
        """Requests of equal salts share cached prefixes."""
        if self._salt_key is None:
            return b""
        return blake2b(tenant.encode(errors="surrogatepass"), key=self._salt_key, digest_size=16, person=b"penstock-salt").digest()
