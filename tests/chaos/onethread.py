"""Every actor of an engine, in one thread and step by step: an exception in any of them ends the test, and nothing is left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq

from penstock.actors.actor import Actor, Post
from penstock.actors.config import EngineConfig
from penstock.actors.messages import Peers
from penstock.actors.process import build_actor

DOOR = "inproc://door"
KINDS = ("executor", "tokenizer", "detokenizer", "scheduler", "gateway")


class OneThread:
    """A mock engine; clients connect to `DOOR` in `context`. Nothing happens but in `turn`."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._supervisor = self.context.socket(zmq.PULL)
        self._supervisor.bind("inproc://supervisor")
        settings = EngineConfig(executor="mock", address=DOOR, log_level="error", log_file=str(folder / "log"), **config)
        self.actors: dict[str, Actor] = {}
        rows = []
        for number, kind in enumerate(KINDS, start=1):
            post = Post(kind, 0, number, f"inproc://{kind}", "inproc://supervisor", str(folder), settings)
            actor = self.actors[kind] = build_actor(post, self.context)
            rows.append((kind, 0, number, post.address, True, actor.start()))
        for actor in self.actors.values():
            actor.handlers[Peers](Peers(tuple(rows)))
        self.settle()

    def __getattr__(self, kind: str) -> Any:
        return self.__dict__["actors"][kind]

    def turn(self) -> bool:
        """Every actor handles what it has. False if none had anything."""
        busy = False
        for actor in self.actors.values():
            while (message := actor.mail.receive()) is not None:
                busy = True
                actor.handle(message)
            actor.after()
        while self._supervisor.poll(0):
            self._supervisor.recv()
        return busy

    def settle(self) -> None:
        """Until nobody has anything to do any more."""
        idle = 0
        while idle < 3:
            idle = 0 if self.turn() else idle + 1

    def close(self) -> None:
        for actor in self.actors.values():
            actor.finish()
        self.context.destroy(linger=0)
