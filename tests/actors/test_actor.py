"""The loop that all actors have."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import zmq

from penstock.actors.actor import HEARTBEAT_S, Actor, Post
from penstock.actors.config import EngineConfig
from penstock.actors.log import open_log
from penstock.actors.mailbox import open_outbox
from penstock.actors.messages import INSIDE, Drain, Heartbeat, Stop


class Slow(Actor):
    kind = "slow"

    def start(self) -> dict[str, Any]:
        self.handlers[Drain] = lambda _: time.sleep(0.02)
        return {}


def test_an_actor_whose_messages_take_long_shows_its_progress_while_more_of_them_wait(tmp_path: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    supervisor = context.socket(zmq.PULL)
    supervisor.bind("inproc://supervisor")
    post = Post("slow", 0, 1, "inproc://slow", "inproc://supervisor", str(tmp_path), EngineConfig())
    actor = Slow(post, context, open_log("error", str(tmp_path / "log")))
    outbox = open_outbox(context, "inproc://slow")
    for message in [Drain()] * 150 + [Stop()]:
        outbox.send(INSIDE.encode(message))
    assert actor.run()
    beats = []
    while supervisor.poll(0):
        message = INSIDE.decode(supervisor.recv())
        if isinstance(message, Heartbeat):
            beats.append(message.progress)
    most = HEARTBEAT_S / 0.02 + 2
    assert len(beats) >= 3
    assert all(later - earlier <= most for earlier, later in pairwise(beats))
    context.destroy(linger=0)
