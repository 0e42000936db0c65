"""What every actor is: a mailbox, a loop, heartbeats, and the table of its peers.

    Up ──▶ start() ──▶ Ready ──▶ receive(message) …, after() once a wake-up ──▶ stopped

An actor is a thin shell around something pure in engine/. It runs a plain blocking poller: a round trip costs a third of what it does
on an event loop, and there is no state that another task could touch. Every exception ends the actor and reaches the supervisor.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import zmq

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault, Refusal
from penstock.actors.log import Log
from penstock.actors.mailbox import Mailbox
from penstock.actors.messages import Died, Heartbeat, Peers, Ready, Stop, Up
from penstock.actors.tidy import tidy

HEARTBEAT_S = 1.0
BATCH = 256  # messages handled before `after` runs, so that a flood cannot starve it

PeerKey = tuple[str, int]
SUPERVISOR: PeerKey = ("supervisor", 0)
GATEWAY: PeerKey = ("gateway", 0)
SCHEDULER: PeerKey = ("scheduler", 0)
EXECUTOR: PeerKey = ("executor", 0)
ADAPTERS: PeerKey = ("adapters", 0)


@dataclass(frozen=True, slots=True)
class Post:
    """Who an actor is and where it listens. `incarnation` grows with each start of any actor of the engine. `values`: what the fork server
    has read of the model's config (`engine.model.values`), for the executor."""

    kind: str
    index: int
    incarnation: int
    address: str
    supervisor: str
    directory: str
    config: EngineConfig
    values: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    kind: str
    index: int
    incarnation: int
    address: str
    ready: bool
    facts: dict[str, Any] = field(default_factory=dict)


class Actor:
    kind: ClassVar[str]

    def __init__(self, post: Post, context: zmq.Context[zmq.Socket[bytes]], log: Log) -> None:
        self.post = post
        self.config = post.config
        self.context = context
        self.log = log
        self.mail = Mailbox(context, post.address)
        self.mail.connect(SUPERVISOR, post.supervisor)
        self.peers: dict[PeerKey, Peer] = {}
        self.progress = 0
        self.handlers: dict[type[Any], Callable[[Any], None]] = {Peers: self._meet, Stop: lambda _: self.stop()}
        # For messages that must not be handled before certain peers are known: whom, and since which incarnation.
        self.awaits: dict[type[Any], Callable[[Any], tuple[tuple[PeerKey, int], ...]]] = {}
        self.newest: dict[PeerKey, int] = {}  # incarnation ever heard of
        self._early: list[Any] = []
        self._stopped = False

    # ── for an actor to fill in ────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> dict[str, Any]:
        """Load what the job needs; return the facts that others need to know. Raise `Refusal` if it cannot be done."""
        return {}

    def after(self) -> None:
        """Once a wake-up, when the messages at hand are handled."""

    def wake_in(self) -> float:
        """Seconds until `after` must run, message or not."""
        return HEARTBEAT_S

    def met(self, before: dict[PeerKey, Peer]) -> None:
        """The peers changed; `before` is the old table."""

    def load(self) -> dict[str, Any]:
        """For the status report."""
        return {}

    def crashed(self) -> None:
        """An exception of this actor's own code has ended it: keep what may explain it."""

    def finish(self) -> None:
        """The loop has ended: close what `start` opened."""

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> bool:
        """The whole life of the actor. False if it ended by an error."""
        self.tell(Up(self.kind, self.post.index, self.post.incarnation, self.post.address, os.getpid()))
        try:
            facts = self.start()
            # What lives now lives for good: collecting it again and again would pause every stream.
            gc.collect()
            gc.freeze()
            self.tell(Ready(self.kind, self.post.index, self.post.incarnation, facts))
            self.log.info("ready", facts={name: value for name, value in facts.items() if name != "adapters"})  # hundreds of names
            self._loop()
            return True
        except Refusal as refusal:
            self._fault(refusal.fault)
            return False
        except Exception as error:
            self.log.exception("died")
            self._fault(Fault(code="engine_fault", message=f"{type(error).__name__}: {error}", actor=self.kind))
            self.crashed()
            return False
        finally:
            self.finish()
            self.mail.close()

    def stop(self) -> None:
        self._stopped = True

    def tell(self, message: Any) -> None:
        """Send to the supervisor."""
        self.mail.send(SUPERVISOR, message)

    def _loop(self) -> None:
        beat = 0.0
        while not self._stopped:
            now = time.monotonic()
            if now >= beat:
                self.tell(Heartbeat(self.kind, self.post.index, self.post.incarnation, self.progress, self.load()))
                beat = now + HEARTBEAT_S
            self.mail.wait(min(beat - now, self.wake_in()))
            before = self.progress
            for _ in range(BATCH):
                message = self.mail.receive()
                if message is None:
                    break
                self.progress += 1
                self.handle(message)
                if time.monotonic() >= beat:
                    break  # each message may be a step that takes long: who works must not look stalled
            self.after()
            tidy(idle=self.progress == before)

    def handle(self, message: Any) -> None:
        """A message may overtake the news of who sent it, or of whom it speaks. What it asks for would go to somebody dead: so it waits
        for that news, and so do those behind it."""
        awaits = self.awaits.get(type(message))
        if awaits is not None and (self._early or any(self.newest.get(key, 0) < since for key, since in awaits(message))):
            self._early.append(message)
        else:
            self.handlers[type(message)](message)

    def _meet(self, message: Peers) -> None:
        before = self.peers
        self.peers = {(row[0], row[1]): Peer(*row) for row in message.peers}
        for key, peer in self.peers.items():
            if peer.address != self.post.address:
                self.mail.connect(key, peer.address)
        self.newest |= {key: max(peer.incarnation, self.newest.get(key, 0)) for key, peer in self.peers.items()}
        self.met(before)
        early, self._early = self._early, []
        for one in early:
            self.handle(one)

    def _fault(self, fault: Fault) -> None:
        self.log.error("fault", **fault.to_wire())
        self.tell(Died(self.kind, self.post.index, self.post.incarnation, fault.to_wire()))
