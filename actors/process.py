"""The process around an actor: forked for the supervisor, gone with it.

Every child dies with its parent: it holds the read end of a pipe whose write end only the supervisor has, and ends when that end is
closed, however the supervisor died. A byte in it says that only this actor is to end. The executor also asks the kernel to kill it
(PR_SET_PDEATHSIG): it may be deep in a driver call that lets no thread of Python run.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from dataclasses import fields
from typing import Any, NoReturn

import zmq

from penstock.actors.actor import Actor, Post
from penstock.actors.config import EngineConfig
from penstock.actors.log import open_log

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
ACTORS = {
    "gateway": "penstock.actors.gateway:GatewayActor",
    "tokenizer": "penstock.actors.tokenizer:TokenizerActor",
    "scheduler": "penstock.actors.scheduler:SchedulerActor",
    "executor": "penstock.actors.executor:ExecutorActor",
    "detokenizer": "penstock.actors.detokenizer:DetokenizerActor",
    "adapters": "penstock.actors.adapters:AdaptersActor",
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
    """End this process when the other end of the pipe `death` is closed; remove the sockets' folder, which nobody else will. If a byte
    came first, the engine lives on and needs its folder."""

    def watch() -> None:
        if not os.read(death, 1):
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="death", daemon=True).start()


def hide(*names: str) -> None:
    """Have packages not be found by whoever imports them from now on in this process: transformers takes along whatever is there."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # or it says what it misses
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def be_actor(post: Post, death: int) -> NoReturn:
    """Be the actor of a post in this process, whose parent is the supervisor by now, until it ends. `death` is the read end of a pipe."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_NAME, f"{post.kind}{post.index}".encode())  # for `top` and the like
    die_with_parent(death, post.directory)
    if post.kind == "executor":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if post.kind == "tokenizer":
        hide("torch")
    gc.disable()  # see `penstock.actors.tidy`
    well = False
    try:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        well = build_actor(post, context).run()
        context.term()
    except Exception:  # noqa: BLE001  nothing of the fork server's stack may go on in this process
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if well else 1)  # torch's own threads and exit handlers may take seconds, and nothing is left to be done
