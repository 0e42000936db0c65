"""The process around an actor: started by the supervisor, gone with it.

    python -m penstock.actors.process --fd-post N --fd-death N      (a pipe with the post as JSON; the death pipe)

Every child dies with its parent: it holds the read end of a pipe whose write end only the supervisor has, and ends when that end is
closed, however the supervisor died. The executor also asks the kernel to kill it (PR_SET_PDEATHSIG): it may be deep in a driver call
that lets no thread of Python run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import fields
from typing import Any

import zmq

from penstock.actors.actor import Actor, Post
from penstock.actors.config import EngineConfig
from penstock.actors.log import open_log

PR_SET_PDEATHSIG = 1
ACTORS = {
    "gateway": "penstock.actors.gateway:GatewayActor",
    "tokenizer": "penstock.actors.tokenizer:TokenizerActor",
    "scheduler": "penstock.actors.scheduler:SchedulerActor",
    "executor": "penstock.actors.executor:ExecutorActor",
    "detokenizer": "penstock.actors.detokenizer:DetokenizerActor",
}


def build_actor(post: Post, context: zmq.Context[zmq.Socket[bytes]]) -> Actor:
    """The actor for a post. Only its own module is imported: a detokenizer starts without torch."""
    module, name = ACTORS[post.kind].split(":")
    log = open_log(post.config.log_level, post.config.log_file, actor=post.kind, index=post.index, incarnation=post.incarnation)
    actor: Actor = getattr(importlib.import_module(module), name)(post, context, log)
    return actor


def post_to_json(post: Post) -> str:
    values = {spec.name: getattr(post, spec.name) for spec in fields(post)}
    return json.dumps({**values, "config": post.config.to_wire()})


def post_from_json(text: str) -> Post:
    values: dict[str, Any] = json.loads(text)
    return Post(**{**values, "config": EngineConfig.from_wire(values["config"])})


def die_with_parent(death: int, directory: str) -> None:
    """End this process when the other end of the pipe `death` is closed; remove the sockets' folder, which nobody else will."""

    def watch() -> None:
        os.read(death, 1)
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="death", daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd-post", type=int, required=True)
    parser.add_argument("--fd-death", type=int, required=True)
    arguments = parser.parse_args()
    with os.fdopen(arguments.fd_post) as pipe:
        post = post_from_json(pipe.read())
    # Ctrl-C reaches every process of the terminal: the supervisor drains first and then stops its actors.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(arguments.fd_death, post.directory)
    if post.kind == "executor":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    well = build_actor(post, context).run()
    context.term()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if well else 1)  # torch's own threads and exit handlers may take seconds, and nothing is left to be done


if __name__ == "__main__":
    main()
