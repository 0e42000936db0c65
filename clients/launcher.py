"""Start an engine as a child of this process, and connect to it: the embedded use, in a notebook, a test or a pipeline."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.clients.errors import StartError, from_wire

if TYPE_CHECKING:
    from penstock.clients.aio import AsyncClient
    from penstock.clients.link import Keys
    from penstock.clients.sync import Client

_STOP_S = 15.0  # before an engine that was told to stop is killed
_LONGEST_REPORT = 1 << 20


@contextmanager
def launch(model: str = "tiny", *, start_timeout: float | None = None, keys: Keys | None = None, **config: Any) -> Iterator[Client]:
    """`with launch(model="tiny") as client: …` starts an engine, connects to it, and ends it afterwards with all its processes.

    `config` are the fields of `EngineConfig`; `keys` are the client's, if those make the engine ask for them. Whatever becomes of this
    process, the engine ends with it: it holds the other end of a pipe. Raises what kept the engine from starting: `InvalidRequest` for a
    setting, `ModelError` for the model, `StartError` for all else, also if it is not ready within `start_timeout` seconds, which hold for
    each start of an actor, too (none: as `EngineConfig` has it)."""
    from penstock.clients.sync import Client

    with Engine(model, **_timed(start_timeout), **config) as engine:
        engine.wait(start_timeout)
        with Client(engine.address, name="launch", keys=keys) as client:
            yield client


@asynccontextmanager
async def alaunch(
    model: str = "tiny", *, start_timeout: float | None = None, keys: Keys | None = None, **config: Any
) -> AsyncIterator[AsyncClient]:
    """`async with alaunch(model="tiny") as client: …`: like `launch`, for asyncio."""
    from penstock.clients.aio import AsyncClient

    engine = Engine(model, **_timed(start_timeout), **config)
    try:
        await engine.wait_async(start_timeout)
        async with AsyncClient(engine.address, name="launch", keys=keys) as client:
            yield client
    finally:
        await asyncio.to_thread(engine.stop)


class Engine:
    """An engine that is a child of this process. It is starting when this returns; `wait` for it, and `stop` it or use it as a context
    manager. `pid` is its supervisor's. Raises `InvalidRequest` for a setting that cannot be."""

    def __init__(self, model: str = "tiny", **config: Any) -> None:
        self.address = ""
        self._stopped = True
        try:
            settings = EngineConfig.from_wire({"model": model, "log_level": "warning", **config})
        except Refusal as refusal:
            raise from_wire(refusal.fault.to_wire()) from None
        config_read, config_write = os.pipe2(os.O_CLOEXEC)
        self._report, report_write = os.pipe2(os.O_CLOEXEC)
        death_read, self._death = os.pipe2(os.O_CLOEXEC)
        theirs = (config_read, report_write, death_read)
        # -P: what lies in the folder that it is started in, under names such as `sched.py`, is none of its modules.
        command = [sys.executable, "-P", "-m", "penstock.actors.supervisor"]
        command += [f"--fd-{name}={fd}" for name, fd in zip(("config", "report", "death"), theirs, strict=True)]
        try:
            # In a session of its own, Ctrl-C reaches this process only, which then decides what becomes of the engine.
            self._process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL, start_new_session=True)
            with suppress(BrokenPipeError):  # it ended at once: its report, or the lack of one, will tell
                os.write(config_write, json.dumps(settings.to_wire()).encode())
        except OSError as error:
            os.close(self._report)
            os.close(self._death)
            raise StartError(f"cannot start {command[0]}: {error}") from error
        finally:
            for fd in (*theirs, config_write):
                os.close(fd)
        self.pid = self._process.pid
        self._said = b""
        self._stopped = False

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it is ready. Raises what kept it from starting, and `StartError` after `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        while not self._read_report():
            left = None if end is None else end - time.monotonic()
            if (left is not None and left <= 0) or not select.select([self._report], [], [], left)[0]:
                raise StartError(f"the engine was not ready within {seconds:g} s")

    async def wait_async(self, seconds: float | None = None) -> None:
        """The same, in an event loop."""
        loop, end = asyncio.get_running_loop(), None if seconds is None else time.monotonic() + seconds
        while not self._read_report():
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._report, _ring, readable)
            try:
                await asyncio.wait_for(readable, None if end is None else max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise StartError(f"the engine was not ready within {seconds:g} s") from None
            finally:
                loop.remove_reader(self._report)

    @property
    def status(self) -> int | None:
        """Its exit status if it has ended, negative for a signal."""
        return self._process.poll()

    def drain(self) -> None:
        """Let it finish what is open, take nothing new, and end. A second call ends it at once."""
        if self._process.poll() is None:
            self._process.terminate()

    def record(self) -> None:
        """Have it write down what its scheduler did lately, for `penstock replay`. Its log says where. Only once it is ready."""
        if self._process.poll() is None and self.address:
            self._process.send_signal(signal.SIGUSR1)

    def stop(self, seconds: float = _STOP_S) -> None:
        """End it, and wait until it has ended. Open requests end unfinished. After `seconds` it is killed. Harmless twice."""
        if self._stopped:
            return
        self._stopped = True
        os.close(self._death)  # this is what it waits for; the signals are for an engine that cannot listen
        for wait, number in ((seconds, signal.SIGTERM), (1.0, signal.SIGKILL)):
            try:
                self._process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)
        self._process.wait()
        os.close(self._report)

    def __del__(self) -> None:
        if not self._stopped:
            os.close(self._death)  # nobody can stop it any more: let it end by itself
            os.close(self._report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _read_report(self) -> bool:
        """Whether it is ready, as far as it has said. Raises what it reported, or that it ended without a word."""
        while not self.address and select.select([self._report], [], [], 0)[0]:
            more = os.read(self._report, 65536)
            self._said += more
            if b"\n" not in self._said and more and len(self._said) < _LONGEST_REPORT:
                continue
            try:
                report = json.loads(self._said)
            except ValueError:
                status = self._process.wait() if not more else "?"
                raise StartError(f"the engine ended with status {status} before it was ready, and did not say why") from None
            if "error" in report:
                raise from_wire(report["error"])
            self.address = str(report["ready"]).replace("tcp://*:", "tcp://127.0.0.1:")  # one that can be connected to
        return bool(self.address)


def _timed(start_timeout: float | None) -> dict[str, float]:
    return {} if start_timeout is None else {"start_timeout": start_timeout}


def _ring(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
