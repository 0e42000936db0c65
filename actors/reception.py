"""The reception: who has come in by the door, as whom, and how much each may ask for."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import zmq

from penstock.actors.config import EngineConfig
from penstock.actors.door import BATCH, ROUTING_ID, Arrival, Door
from penstock.actors.errors import Fault
from penstock.actors.log import Log
from penstock.actors.meter import Meter, Verdict
from penstock.actors.protocol import Adapters, Control, Failed, Generate, Goodbye, Hello, List, Renew, Report, Status, Welcome
from penstock.actors.sessions import Session, Sessions
from penstock.actors.wire import WireError

MOST_SESSIONS = 16_384
MOST_SESSIONS_OF_USER = 1024
TURN_S = 0.05  # of messages taken before others have their turn
UNREAD = 4  # times the largest message: answers that a client may leave unread, in bytes
TELL_EVERY_S = 10.0  # of connections that were refused: strangers must not fill the disk
MOST_TOLD = 16  # files of keys that are wrong, in one line of the log
STRANGERS = (10.0, 2.0**20)  # messages and bytes a second of a connection that was not welcomed


class Reception:
    """`report` answers a `Status`, which anyone may ask, also while the engine is starting. Raises `Refusal` as `Door` does."""

    def __init__(self, context: zmq.Context[Any], config: EngineConfig, log: Log, report: Callable[[Status], Report]) -> None:
        self.config, self.log, self.report = config, log, report
        self.door = Door(context, config)
        self.sessions = Sessions()
        self.turned_away = 0  # requests that came too fast
        self.busy = False  # more was waiting at the door than was taken
        self._meter = Meter(config.message_rate, config.byte_rate, 2 * MOST_SESSIONS)
        self._strangers = Meter(*STRANGERS, MOST_SESSIONS)
        self._welcome: Welcome | None = None  # none: the engine is not ready
        self._met: OrderedDict[bytes, None] = OrderedDict()  # connections that said Hello: each may once
        self._waiting: dict[tuple[str, str], tuple[Arrival, Hello]] = {}  # clients that came before that
        self._refused, self._told_refused = 0, 0.0  # connections, as the log has it, and since when
        self._key_error: str | None = None  # as the log has it, and since when
        self._told_error = -TELL_EVERY_S
        self._unreadable: list[str] = []

    def open(self, welcome: Welcome, now: float) -> None:
        """The engine is ready: greet who waits, and whoever comes from now on, with this."""
        self._welcome = welcome
        for (user, _), (arrival, hello) in self._waiting.items():
            if self.door.users.get(arrival.key) == user:
                self._meet(arrival, user, hello, welcome, now)
        self._waiting.clear()

    def revoked(self, now: float) -> list[Session]:
        """Judge who is connecting. Returns the sessions of those who were in and may not be any more."""
        if self.door.refused > self._refused and now - self._told_refused >= TELL_EVERY_S:
            self._refused, self._told_refused = self.door.refused, now
            self.log.warning("connections without a known key were refused", so_far=self._refused)
        changed = self.door.look(now)
        self._tell_of_keys(changed, now)
        if not changed:
            return []
        return [session for session in self.sessions if self.door.users.get(session.key) != session.user]

    def _tell_of_keys(self, changed: bool, now: float) -> None:
        """Only what is new: the folder is looked at many times a second."""
        users, error, unreadable = len(self.door.users), self.door.error, self.door.unreadable
        if changed:
            self.log.info("keys read", users=users)
        if error is None:
            self._key_error = None
        elif error != self._key_error and now - self._told_error >= TELL_EVERY_S:  # strangers may use up the descriptors, again and again
            self._key_error, self._told_error = error, now
            self.log.error("the folder of keys cannot be read", error=error, users=users)
        if unreadable != self._unreadable:
            self.log.warning("files of keys that let nobody in", files=len(unreadable), why=unreadable[:MOST_TOLD])
            self._unreadable = unreadable

    def receive(self, now: float) -> Iterator[tuple[Session, Any]]:
        """What clients ask, one after another: each is to be dealt with before the next is taken. What that takes counts against who
        asked, and ends the turn if it is too long: neither may a flood of small messages, or of messages that are hard to read, keep
        the engine's own waiting."""
        taken, end = 0, time.monotonic() + TURN_S
        spent = time.thread_time()
        for arrival in self.door.receive():
            taken += 1
            try:
                yield from self._judge(arrival, now)
            except WireError as error:
                self.door.send(arrival.identity, Failed(None, Fault(code=error.code, message=str(error)).to_wire()))
            before, spent = spent, time.thread_time()
            self._meter_of(self.sessions.find(arrival.identity)).spend(arrival.identity, spent - before)
            if time.monotonic() > end:
                break
        self.busy = taken == BATCH or time.monotonic() > end

    def answer(self, session: Session, message: Any) -> None:
        session.answered += self.door.send(session.identity, message)

    def send_chunks(self, now: float) -> int:
        """Send all news to those who have credit. Returns the number of messages."""
        ready = [session for session in self.sessions.with_news() if session.may_send(self.config.window)]
        for session in ready:
            self.door.send(session.identity, session.chunks(now))
        return len(ready)

    def close(self) -> None:
        self.door.close()

    def _judge(self, arrival: Arrival, now: float) -> Iterator[tuple[Session, Any]]:
        identity, user = arrival.identity, self.door.users.get(arrival.key)
        session = self.sessions.find(identity)
        if user is None or (session is not None and session.user != user):
            return  # its key was revoked, or it took the place of another's connection
        meter = self._meter_of(session)
        verdict = meter.judge(identity, arrival.size, now)
        if session is not None:
            session.seen = now
        if verdict == "far too much" and arrival.size <= self.config.max_message:  # else it is told that, whoever it is
            if meter.warn(identity):
                self.door.send(identity, Failed(None, _too_much(meter.turn(identity))))
            return
        message = self.door.decode(arrival.frame)
        if isinstance(message, Hello):
            self._hello(arrival, user, message, now)
        elif session is None:
            self.door.send(identity, self.report(message) if isinstance(message, Status) else Goodbye())
        elif isinstance(message, Renew) and message.received > session.number:
            raise WireError("malformed", f"Renew.received is {message.received}, and {session.number} were sent")
        elif self._may_ask(session, message, verdict, now):
            yield session, message
        elif isinstance(message, Generate):
            self.turned_away += 1
            self.answer(session, Failed(message.request, _too_much(meter.turn(identity))))

    def _meter_of(self, session: Session | None) -> Meter:
        return self._strangers if session is None else self._meter

    def _may_ask(self, session: Session, message: Any, verdict: Verdict, now: float) -> bool:
        if isinstance(message, Generate):
            return verdict == "fine" and self._reads(session, now)
        return not isinstance(message, List | Status | Control | Adapters) or self._reads(session, now)

    def _reads(self, session: Session, now: float) -> bool:
        """Whether a client reads its answers. If many wait and no chunks are on their way, as many empty ones follow as it must
        acknowledge at once; who does not is told nothing more."""
        most = UNREAD * self.config.max_message
        if session.unread > most // 2 and session.number == session.acknowledged:
            for _ in range(max(1, self.config.window // 4)):
                self.door.send(session.identity, session.chunks(now))
        return session.unread <= most

    def _hello(self, arrival: Arrival, user: str, hello: Hello, now: float) -> None:
        if not 0 < len(hello.client) <= 64 or len(hello.name) > 256:
            raise WireError("malformed", "Hello.client must have 1 to 64 characters, Hello.name at most 256")
        if not self.door.fits(arrival.identity):
            raise WireError("malformed", f"with a key, a connection must set a routing id of {ROUTING_ID} or more random bytes")
        if arrival.identity in self._met:  # else what it has not read yet would be forgotten
            raise WireError("malformed", "Hello is said once: a client that begins anew needs a new connection")
        known = hello.client in self.sessions.of(user) or (user, hello.client) in self._waiting
        every = len(self.sessions) + len(self._waiting)
        mine = len(self.sessions.of(user)) + sum(owner == user for owner, _ in self._waiting) if user else 0
        if not known and (every >= MOST_SESSIONS or mine >= MOST_SESSIONS_OF_USER):
            text = f"{every} clients are connected" + (f", {mine} of them {user}'s" if user else "")
            limit = f"{MOST_SESSIONS} clients, {MOST_SESSIONS_OF_USER} of one user"
            fault = Fault(code="overloaded", message=text, limit=limit, retry_after=self.config.lease)
            self.door.send(arrival.identity, Failed(None, fault.to_wire()))
            return
        self._met[arrival.identity] = None
        if len(self._met) > 2 * MOST_SESSIONS:
            self._met.popitem(last=False)
        if self._welcome is None:
            self._waiting[user, hello.client] = replace(arrival, frame=b""), hello
        else:
            self._meet(arrival, user, hello, self._welcome, now)

    def _meet(self, arrival: Arrival, user: str, hello: Hello, welcome: Welcome, now: float) -> None:
        self.sessions.meet(hello.client, hello.name, arrival.identity, now, user, arrival.key)
        self.door.send(arrival.identity, welcome)


def _too_much(wait: float) -> dict[str, Any]:
    text = "the connection sends more, or reads less, than this engine takes from one"
    return Fault(code="overloaded", message=text, limit="message_rate, byte_rate", retry_after=max(0.1, wait)).to_wire()
