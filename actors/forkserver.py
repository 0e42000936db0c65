"""The fork server: it has imported what actors need, and becomes one whenever the supervisor asks.

    python -m penstock.actors.forkserver --fd-control N

Importing torch and a model class takes seconds, forking a process that has done so takes milliseconds: so an actor that died is back
before its clients notice. The server opens no device and starts no thread, so that it may be forked; what it holds is frozen, and shared
by all actors until they write to it. Each actor is forked twice and adopted by the supervisor, a subreaper: so the supervisor learns of
its death from the kernel, and the fork server may die without one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.actors.actor import Post
from penstock.actors.process import ACTORS, be_actor, hide, post_from_json, post_to_json

MOST_BYTES = 1 << 16  # of one request
HEAVY = ("penstock.engine.model.build", "penstock.engine.memory", "penstock.engine.runner")  # torch, and all that runs a model
# What tokenizers need: those of the start import it by themselves, meanwhile.
LATER, IDLE_S = "transformers.tokenization_utils_tokenizers", 1.0
# Versions of transformers import these where they are installed, for pictures and figures that nobody asks for here: it takes twice as
# long, then.
NEEDLESS = ("torchvision", "sklearn")


class ForkServer:
    """The supervisor's side: asks for actors, and hears who was born. `control` is readable when there is news."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "penstock.actors.forkserver", "--fd-control", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # numpy would start its threads when it is imported; nobody uses them
            )
        self._owed: dict[int, str] = {}  # incarnation → kind of those asked for and not born yet; it makes them one by one, in this order
        self._made: set[str] = set()  # kinds of those born
        self._since = 0.0  # when it had nothing to do but the first of them

    def ask(self, post: Post, death: int) -> None:
        """Ask for an actor that holds the descriptor `death`. Whether it comes is known only by `born`."""
        if not self._owed:
            self._since = time.monotonic()
        self._owed[post.incarnation] = post.kind
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.control, [post_to_json(post).encode()], [death])

    def born(self) -> tuple[int, int] | None:
        """The incarnation and process id of the next actor that was forked; None if there is no news now, or never will be: see `gone`."""
        with suppress(BlockingIOError, ConnectionResetError):
            message = self.control.recv(MOST_BYTES, socket.MSG_DONTWAIT)
            if message:
                incarnation, pid = json.loads(message)
                self._made.add(self._owed.pop(incarnation))
                self._since = time.monotonic()
                return incarnation, pid
        return None

    def stalled(self, now: float, forking: float, importing: float) -> float | None:
        """For how long it has been at one actor, if that is too long: longer than `forking` seconds, or `importing` for the first of all
        and the first executor, before which it imports what they need."""
        kind = next(iter(self._owed.values()), None)
        if kind is None:
            return None
        imports = not self._made or (kind == "executor" and kind not in self._made)
        still = now - self._since
        return still if still > (importing if imports else forking) else None

    def gone(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """End it; its actors live on."""
        self.control.close()
        self._process.kill()
        self._process.wait()


def preload(model: str, decoder: str) -> dict[str, Any] | None:
    """Import what runs a model. Returns its config, if the native decoder can do with that. The model itself is opened by the executor
    alone, and errors in it are its to report."""
    with suppress(Exception):  # whatever it is, torch that is not installed for one, the executor meets it too, and says so
        from penstock.engine.model.spec import NATIVE, read_family, read_spec
        from penstock.engine.open import model_folder

        spec = read_spec(model_folder(model), weights="random")
        native = spec.model_type in NATIVE and decoder != "adopted"
        reading = begin_reading(spec.folder) if native else None
        for name in HEAVY:
            importlib.import_module(name)
        if reading is not None and (values := end_reading(*reading)) is not None:
            return values  # it needs nothing of transformers
        config = read_family(spec.folder, "unsupported_model", spec.model_type)
        if native:
            return None  # it needs nothing of the family's own code
        from transformers import AutoModelForCausalLM

        # Looking a class up imports its module.
        AutoModelForCausalLM._model_mapping[type(config)]
        # It compiles a thousand patterns of weight names, of all families, at the first call: a third of what tiny takes to load.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    return None


def begin_reading(folder: Path) -> tuple[int, int]:
    """Read a model's config in a process of its own, which never imports torch. Returns its process id, and the descriptor that it writes
    to."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        hide("torch")
        with os.fdopen(write, "w") as pipe:
            json.dump(importlib.import_module("penstock.engine.model.values").read_values(folder), pipe, default=str)
    finally:
        os._exit(0)  # what was wrong the executor meets, too


def end_reading(child: int, read: int) -> dict[str, Any] | None:
    """What it has read; None if it could not, or if that is not enough."""
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    values: dict[str, Any] | None = json.loads(text) if text else None
    return values


def fork_actor(post: Post, death: int, control: socket.socket) -> None:
    """Fork the actor and, once the supervisor has adopted it, tell that its process id. Returns in the fork server only."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as pipe:
            actor = int(pipe.readline())
        os.waitpid(child, 0)
        with suppress(BrokenPipeError, ConnectionResetError):  # the supervisor is gone, and so will the actor be
            control.send(json.dumps([post.incarnation, actor]).encode())
        return
    between, actor = os.getpid(), os.fork()
    if actor:
        os.write(write, f"{actor}\n".encode())
        os._exit(0)
    for descriptor in (read, write, control.detach()):
        os.close(descriptor)
    while os.getppid() == between:  # until the supervisor has adopted it: it asks to die with its parent
        time.sleep(0.0002)
    be_actor(post, death)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd-control", type=int, required=True)
    control = socket.socket(fileno=parser.parse_args().fd_control)
    # Ctrl-C reaches every process of the terminal: the supervisor drains first and then stops its actors.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hide(*NEEDLESS)
    for name in ACTORS.values():
        importlib.import_module(name.partition(":")[0])
    loaded, ready, values = False, False, None
    while True:
        if loaded and not ready and not select.select([control], [], [], IDLE_S)[0]:
            ready = True
            with suppress(Exception):  # as in `preload`
                importlib.import_module(LATER)
        message, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, 1)
        if not message:
            return  # the supervisor is gone
        post = post_from_json(message.decode())
        if post.kind == "executor" and post.config.executor != "mock" and not loaded:
            loaded = True
            values = preload(post.config.model, post.config.decoder)
        gc.collect()
        gc.freeze()  # nothing that is shared is moved about by a collection in a child
        fork_actor(replace(post, values=values), descriptors[0], control)
        os.close(descriptors[0])


if __name__ == "__main__":
    main()
