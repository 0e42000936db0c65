"""The client's side of the protocol, without sockets and without a clock: frames and times in, frames and news out.

`AsyncClient` and `Client` drive the same machine. A driver opens a link and calls `opened`; passes each frame to `receive`; calls `tick`
when `due` has come; after any call sends what is in `outbox`, and if `reopen` is set closes its link and opens another, no earlier than
`reopen_at`. Links come and go, requests stay: whatever was received is kept here, and each new link carries on from it.

    connecting ── opened: Hello ──▶ connecting ── Welcome: Generate, resume, Cancel ──▶ ready ── lost, Goodbye, silence ──▶ connecting
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from penstock.actors import protocol as wire
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY, Chunks, Failed, Welcome
from penstock.actors.wire import VERSION, Limits
from penstock.clients.errors import (
    ClientClosed,
    ConnectionLost,
    DuplicateRequest,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PenstockError,
    ProtocolError,
    Unauthorized,
    Unavailable,
    VersionMismatch,
    from_wire,
)
from penstock.clients.inbox import Inbox
from penstock.clients.order import encode
from penstock.clients.pulse import Pulse
from penstock.clients.query import PROBE, Queries, Query, Question
from penstock.clients.streams import Streams

OUT_OF_TIME = ("deadline", "queue_timeout")  # codes that are reasons, as of requests that were accepted

News = list[Inbox | Query]


class Connection:
    """`client` is the unique id to which requests belong; `name` is for people. After `patience` seconds without an engine, requests
    fail with `ConnectionLost`. Times are seconds on the driver's monotonic clock."""

    def __init__(self, client: str, name: str, patience: float, now: float) -> None:
        self.client, self.name, self.patience = client, name, patience
        self.outbox: deque[bytes] = deque()
        self.welcome: Welcome | None = None
        self.ready, self.reopen, self.reopen_at = False, True, now
        self.error: PenstockError | None = None  # set: nothing works any more
        self._inboxes: dict[str, Inbox] = {}
        self._streams = Streams()
        self._queries = Queries()
        self._acknowledged = 0
        self._lost_at = self._welcomed_at = now
        self._pulse = Pulse(now)
        self._attempts = 0
        self._burst = 1  # acknowledge after so many `Chunks`
        self._limits: Limits | None = None
        self._forgotten: list[str] = []  # cancelled while there was no engine to tell
        self._again: dict[str, float] = {}  # begun, but the engine that took over is too busy to resume them before this time

    # What the driver reports.

    def opened(self, now: float) -> None:
        """There is a fresh link: introduce ourselves. Nothing that was meant for an older one is sent over it."""
        self.reopen, self._attempts = False, self._attempts + 1
        self.ready = False
        self._begin(now)
        self._say(wire.Hello(self.client, self.name), now)

    def refuse(self, now: float) -> News:
        """The engine does not know this client's key, or not any more. Returns whom to wake."""
        return self._break(Unauthorized("the engine does not take this client's key"), now)

    def lost(self, now: float) -> None:
        """The link broke, or the engine does not know it: ask the driver for another. The first is made at once, later ones less often."""
        if self.ready:
            self._lost_at = now
            if now - self._welcomed_at > 1.0:  # else it may go on like this: welcomed, then sent away
                self._attempts = 0
        self.ready, self.reopen = False, True
        self.reopen_at = now + (min(2.0, 0.05 * 2.0**self._attempts) if self._attempts else 0.0)
        self.outbox.clear()

    def receive(self, frame: bytes, now: float) -> News:
        """Take one frame. Returns whom to wake. Frames of a link that was given up are to be dropped by the driver."""
        self._pulse.heard = now
        try:
            if len(frame) < 2 or frame[1] != VERSION:
                raise VersionMismatch(f"the engine does not speak version {VERSION} of the protocol")
            message = TO_CLIENT.decode(frame)
            return self._handle(message, now)
        except ProtocolError as error:
            return self._break(error, now)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            return self._break(ProtocolError(f"the engine sent what is no message: {error!r}"), now)

    def tick(self, now: float) -> News:
        """Renew the lease, look for silence, lose patience. Returns whom to wake."""
        if not self.ready:
            return self._lose_patience(now)
        news: News = []
        for request in [request for request, at in self._again.items() if now >= at]:
            del self._again[request]
            news += self._order(self._inboxes[request], now)
        beat = self._pulse.beat(now, bool(self._inboxes))
        if beat == "renew":
            self._acknowledge(now)
        elif beat == "probe":
            self._say(wire.List(PROBE), now)
        elif beat == "dead":
            self.lost(now)
        return news

    @property
    def due(self) -> float:
        """When `tick` wants to be called next."""
        if self.ready:
            return min(self._pulse.due(bool(self._inboxes)), *self._again.values(), float("inf"))
        waiting = [max(self._lost_at, one.since) for one in self._everyone()]
        return min(waiting) + self.patience if waiting else float("inf")

    # What the caller asks for.

    def start(self, inbox: Inbox, now: float) -> None:
        """Begin a request. Raises `InvalidRequest` if it cannot be sent, and what broke the connection if it is broken."""
        if self.error is not None:
            raise self.error.again()
        if inbox.request in self._inboxes:
            raise DuplicateRequest(f"request {inbox.request} is open on this client", field="request", value=inbox.request)
        frame = encode(inbox.next_order(now), self._limits)
        self._inboxes[inbox.request] = inbox
        if self.ready:
            self._send(frame, now)

    def ask(self, question: Callable[[int], Question], wake: Callable[[], None], now: float) -> Query:
        """Ask, and ask again over each new link until there is an answer. `question` makes the message, given its number."""
        if self.error is not None:
            raise self.error.again()
        query = self._queries.add(question, wake, now)
        if self.ready:
            self._say(query.message, now)
        return query

    def cancel(self, requests: Sequence[str], now: float) -> News:
        """End requests of this client, by id. The terminal message ends them here, unless the engine never heard of them."""
        news: News = []
        for inbox in filter(None, map(self._inboxes.get, requests)):
            inbox.cancelled = True
            if not self.ready or inbox.request in self._again:
                news.append(self._end_cancelled(inbox, now))
        if self.ready and requests:
            self._say(wire.Cancel(tuple(requests)), now)
        return news

    def close(self, now: float) -> News:
        """Leave: the engine ends what is open. Returns whom to wake; they find `ClientClosed`."""
        if self.error is None:
            self._say(wire.Goodbye(), now)
        self.ready = self.reopen = False
        self.error = ClientClosed("the client was closed")
        return self._fail_all(self.error, now)

    # Inside.

    def _begin(self, now: float) -> None:
        self._streams.clear()
        self._again.clear()
        self._acknowledged = 0
        self.outbox.clear()

    def _send(self, frame: bytes, now: float) -> None:
        self.outbox.append(frame)
        self._pulse.said = now

    def _say(self, message: object, now: float) -> None:
        self._send(TO_GATEWAY.encode(message), now)

    def _acknowledge(self, now: float) -> None:
        self._acknowledged = self._streams.received
        self._say(wire.Renew(self._acknowledged), now)

    def _handle(self, message: Any, now: float) -> News:
        kind = type(message)
        if kind is Chunks:
            return self._take(message, now)
        if kind is wire.Accepted:
            inbox = self._inboxes.get(message.request)
            if inbox is not None and not inbox.over:
                for stream, track in zip(message.streams, inbox.accept(len(message.streams), message.resolved), strict=True):
                    self._streams.attach(stream, track)
        elif kind is Failed:
            return self._failed(message, now)
        elif kind is Welcome:
            return self._welcomed(message, now)
        elif kind is wire.Listing and message.query == PROBE:
            made = {row["request"]: row["generated_tokens"] for row in message.requests}
            begun = [inbox for inbox in self._inboxes.values() if inbox.resolved is not None]
            if any(made.get(inbox.request, float("inf")) > inbox.tokens for inbox in begun):
                self.lost(now)  # what it said last was lost on the way: it is said again on resuming
        elif kind is wire.Listing or kind is wire.Report:
            query = self._queries.answered(message)
            return [] if query is None else [query]
        elif kind is wire.Goodbye:
            self.lost(now)
        return []

    def _take(self, message: Chunks, now: float) -> News:
        readers = self._streams.take(message, now)
        if readers is None:
            self.lost(now)  # something between was dropped: a fresh link resumes from what is here
            return []
        news: News = [*readers]
        for request, usage in message.done:
            if (ended := self._inboxes.get(request)) is not None:
                ended.finish(usage, now)
                news.append(self._close(ended))
        if self._streams.received - self._acknowledged >= self._burst:
            self._acknowledge(now)
        return news

    def _welcomed(self, message: Welcome, now: float) -> News:
        if self.ready and self.welcome is not None and self.welcome.engine == message.engine:
            return []
        if self.ready:  # another engine took over behind the same link
            self._begin(now)
        largest = message.limits.get("message")
        self._limits = Limits(bytes=largest) if isinstance(largest, int) else Limits()
        self.welcome, self.ready, self._welcomed_at = message, True, now
        self._burst = max(1, message.window // 4)
        self._pulse.start(message.lease, now)
        news: News = []
        forgotten, self._forgotten = self._forgotten, []
        for inbox in tuple(self._inboxes.values()):
            if inbox.cancelled:  # the word may have been lost with the old link
                news.append(self._end_cancelled(inbox, now))
            else:
                news += self._order(inbox, now)
        self._forgotten, forgotten = [], [*forgotten, *self._forgotten]
        if forgotten:
            self._say(wire.Cancel(tuple(forgotten)), now)
        for query in self._queries:
            self._say(query.message, now)
        return news

    def _order(self, inbox: Inbox, now: float) -> News:
        try:
            self._send(encode(inbox.next_order(now), self._limits), now)
        except InvalidRequest as error:
            inbox.fail(error, now)
            return [self._close(inbox)]
        inbox.answered = False
        return []

    def _failed(self, message: Failed, now: float) -> News:
        error = from_wire(message.error)
        if message.request is None:
            if isinstance(error, VersionMismatch):
                return self._break(error, now)
            orders = self._queries.orders
            if error.code == "unknown_message" and orders:  # the engine is older than orders are
                for query in orders:
                    self._fail_one(query, error, now)
                return [*orders]
            # About a message that it could not tie to a request: it can only be one that it has not answered.
            unheard = [one for one in self._inboxes.values() if not one.answered]
            for one in unheard:
                self._fail_one(one, error, now)
            if unheard:  # some of them may be on their way: nobody would read them
                self._say(wire.Cancel(tuple(one.request for one in unheard)), now)
            return [*unheard]
        inbox = self._inboxes.get(message.request)
        if inbox is None:
            return []
        if inbox.resolved is None and (inbox.cancelled or error.code in OUT_OF_TIME):
            inbox.finish_unbegun("cancelled" if inbox.cancelled else error.code, now)  # as it was asked to: before it began
            return [self._close(inbox)]
        if isinstance(error, LeaseExpired) and inbox.resolved is not None:
            self.lost(now)  # this process slept; what it holds is enough to carry on
            return []
        if isinstance(error, Overloaded | Unavailable) and inbox.resolved is not None and now - self._lost_at < self.patience:
            self._again[inbox.request] = now + (error.retry_after or 1.0)
            return []
        inbox.fail(error, now)
        return [self._close(inbox)]

    def _close(self, inbox: Inbox) -> Inbox:
        self._inboxes.pop(inbox.request, None)
        self._again.pop(inbox.request, None)
        self._streams.detach(inbox)
        return inbox

    def _end_cancelled(self, inbox: Inbox, now: float) -> Inbox:
        self._forgotten.append(inbox.request)
        inbox.finish_unbegun("cancelled", now)
        return self._close(inbox)

    def _lose_patience(self, now: float) -> News:
        late = [one for one in self._everyone() if now - max(self._lost_at, one.since) >= self.patience]
        for one in late:
            self._fail_one(one, ConnectionLost(f"no engine answered for {self.patience:g} s"), now)
        return late

    def _break(self, error: PenstockError, now: float) -> News:
        """Nothing that comes over this link can be trusted any more, and another would bring the same."""
        self.error, self.ready, self.reopen = error, False, False
        return self._fail_all(error, now)

    def _everyone(self) -> News:
        return [*self._inboxes.values(), *self._queries]

    def _fail_all(self, error: PenstockError, now: float) -> News:
        everyone = self._everyone()
        for one in everyone:
            self._fail_one(one, error, now)
        return everyone

    def _fail_one(self, one: Inbox | Query, error: PenstockError, now: float) -> None:
        if isinstance(one, Inbox):
            one.fail(error.again(), now)
            self._close(one)
        else:
            one.error = error.again()
            self._queries.drop(one)
