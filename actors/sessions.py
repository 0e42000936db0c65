"""Clients: who is connected, until when, what they were sent, and how much more they may be sent.

Answers to what a client asks (`Accepted`, `Listing`, `Report`, `Failed`) have no credits of their own, but come in order with its chunks:
whoever acknowledges a chunk has read all answers before it. So what a client asks for and does not read is counted, and bounded.

Credits are messages, not tokens: a client may leave `window` of them unacknowledged. Beyond that nothing is sent and nothing is
queued either, because a chunk is just the part of the journal that was not sent yet: a slow reader gets fewer, larger chunks.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.actors.protocol import Chunks
from penstock.actors.request import Entry, OpenRequest


@dataclass(slots=True, eq=False)
class Session:
    client: str
    name: str
    identity: bytes  # of its connection
    seen: float
    user: str = ""  # whose it is, where keys are demanded
    key: str = ""  # that its connection was made with
    number: int = 0  # of the last Chunks message
    acknowledged: int = 0
    streams: int = 0  # stream numbers given out
    answered: int = 0  # bytes of answers
    read: int = 0  # of them, those that it has read for certain
    marks: deque[tuple[int, int]] = field(default_factory=deque)  # Chunks number, bytes of answers before it
    requests: dict[str, OpenRequest] = field(default_factory=dict)
    held: int = 0  # streams of these
    dirty: dict[int, Entry] = field(default_factory=dict)  # handle → entry with unsent news
    finished: deque[tuple[int, OpenRequest]] = field(default_factory=deque)  # told in Chunks number, not yet acknowledged
    news: set[Session] = field(default_factory=set)  # the sessions that have some, shared by all

    def attach(self, identity: bytes, now: float) -> None:
        """A new connection of a known client: its streams are sent again when it asks to resume them."""
        self.identity, self.seen, self.number, self.acknowledged = identity, now, 0, 0
        self.answered = self.read = 0
        self.marks.clear()
        self.dirty.clear()
        self.finished.clear()
        for request in self.requests.values():
            request.left = now

    def acknowledge(self, received: int) -> list[OpenRequest]:
        """The client has this much for certain. Returns the requests whose end is part of it."""
        self.acknowledged = max(self.acknowledged, min(received, self.number))
        while self.marks and self.marks[0][0] <= self.acknowledged:
            self.read = self.marks.popleft()[1]
        over = []
        while self.finished and self.finished[0][0] <= self.acknowledged:
            request = self.finished.popleft()[1]
            if not request.over:
                over.append(request)
        return over

    @property
    def unread(self) -> int:
        """Bytes of answers that may still be waiting for it."""
        return self.answered - self.read

    def mark(self, entry: Entry) -> None:
        if entry.request.left is None:
            self.dirty[entry.handle] = entry
            self.news.add(self)

    def may_send(self, window: int) -> bool:
        return bool(self.dirty) and self.number - self.acknowledged < window

    def chunks(self, now: float) -> Chunks:
        """All unsent news of all streams, as one message."""
        streams, counts, ids, texts = array("i"), array("i"), array("i"), []
        details: list[Any] = []
        ends: list[Any] = []
        done: list[Any] = []
        self.number += 1
        for entry in self.dirty.values():
            pieces = len(entry.counts)
            if entry.prompt_logprobs is not None and not entry.told_prompt:
                details.append((entry.stream, "prompt", entry.prompt_logprobs))
                entry.told_prompt = True
            if entry.sent_pieces + 1 < pieces and not entry.counts[entry.sent_pieces]:
                # The prompt's echo is a row of its own: who resumes without an id is sent it again, and can tell it by that.
                streams.append(entry.stream)
                counts.append(0)
                texts.append(entry.texts[entry.sent_pieces])
                entry.sent_pieces += 1
            if entry.sent_pieces < pieces:
                if entry.logprobs:
                    details.append((entry.stream, entry.logprobs[entry.sent_ids - entry.base :]))
                streams.append(entry.stream)
                total = len(entry.ids)
                counts.append(total - entry.sent_ids)
                ids.extend(entry.ids[entry.sent_ids :])
                texts.append(entry.texts[-1] if pieces - entry.sent_pieces == 1 else "".join(entry.texts[entry.sent_pieces :]))
                entry.sent_pieces, entry.sent_ids = pieces, total
            if entry.ended is not None and not entry.told_end:
                ends.append((entry.stream, *entry.ended))
                entry.told_end = True
                if entry.request.state == "told":
                    done.append((entry.request.id, entry.request.usage(now)))
                    self.finished.append((self.number, entry.request))
        self.dirty.clear()
        self.news.discard(self)
        self.marks.append((self.number, self.answered))
        return Chunks(
            self.number, streams.tobytes(), counts.tobytes(), ids.tobytes(), tuple(texts), tuple(details), tuple(ends), tuple(done)
        )


class Sessions:
    """Clients by the identity of their connection, and by whose they are and their own id: two users' clients of one id are two."""

    def __init__(self) -> None:
        self._by_identity: dict[bytes, Session] = {}
        self._by_user: dict[str, dict[str, Session]] = {}
        self._news: set[Session] = set()
        self.streams = 0  # of all clients: open ones, and ended ones that are not acknowledged yet

    def __iter__(self) -> Iterator[Session]:
        return iter([session for clients in self._by_user.values() for session in clients.values()])

    def with_news(self) -> list[Session]:
        """Those with something to send."""
        return list(self._news)

    def of(self, user: str) -> Mapping[str, Session]:
        return self._by_user.get(user, {})

    def held(self, session: Session) -> int:
        """Streams of a client, ended ones that it has not acknowledged included; those of all the user's clients, if it has a user."""
        return sum(one.held for one in self.of(session.user).values()) if session.user else session.held

    def requests(self) -> Iterator[OpenRequest]:
        return (request for session in self for request in session.requests.values())

    def add(self, request: OpenRequest) -> None:
        request.session.requests[request.id] = request
        request.session.held += request.streams
        self.streams += request.streams

    def remove(self, request: OpenRequest) -> None:
        """A request is over."""
        session = request.session
        del session.requests[request.id]
        session.held -= request.streams
        self.streams -= request.streams
        for entry in request.entries:
            session.dirty.pop(entry.handle, None)
        request.end()

    def __len__(self) -> int:
        return sum(map(len, self._by_user.values()))

    def find(self, identity: bytes) -> Session | None:
        return self._by_identity.get(identity)

    def meet(self, client: str, name: str, identity: bytes, now: float, user: str = "", key: str = "") -> Session:
        """The session of a client that said Hello: a new one, or its own, moved to this connection."""
        clients = self._by_user.setdefault(user, {})
        session = clients.get(client)
        if session is None:
            session = clients[client] = Session(client, name, identity, now, user, key, news=self._news)
        else:
            self._by_identity.pop(session.identity, None)
            session.attach(identity, now)
            session.key = key
        self._by_identity[identity] = session
        return session

    def forget(self, session: Session) -> None:
        clients = self._by_user.get(session.user, {})
        clients.pop(session.client, None)
        if not clients:
            self._by_user.pop(session.user, None)
        self._news.discard(session)
        if self._by_identity.get(session.identity) is session:
            del self._by_identity[session.identity]
