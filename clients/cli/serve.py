"""`penstock serve`: run an engine in the foreground."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from penstock.actors.config import EngineConfig
from penstock.clients.address import announce
from penstock.clients.cli.options import only_given, with_tables
from penstock.clients.cli.report import reported, stderr, stdout
from penstock.clients.errors import EngineFault, PenstockError
from penstock.clients.launcher import Engine
from penstock.clients.sync import Client

_EVERY = 1.0  # seconds between looks at the engine


@with_tables(EngineConfig, panels=("Engine",), skip=("model",))
def serve(
    model: Annotated[str, typer.Argument(help="a folder, a hub id, or `tiny`, the model in the package")] = "tiny",
    live: Annotated[bool | None, typer.Option(help="show a line of what it is doing; as default in a terminal")] = None,
    **given: Any,
) -> None:
    """Serve a model until Ctrl-C, which lets open requests finish; a second Ctrl-C ends them. The address appears when it is ready, and
    `generate`, `chat` and `status` find it by themselves."""
    with reported():
        stop = _Stop()
        given["log_level"] = given.get("log_level") or "warning"
        begun = time.monotonic()
        with Engine(model, **only_given(given)) as engine:
            stop.engine = engine
            engine.wait()
            note = announce(engine.address, model)
            try:
                stdout().print(f"[bold green]ready[/] after {time.monotonic() - begun:.1f} s: {model} at [bold]{engine.address}[/]")
                # With keys, the engine takes no client without one, this command included.
                _watch(engine, stop, (stdout().is_terminal if live is None else live) and "secret_key" not in only_given(given))
            finally:
                note.unlink(missing_ok=True)
        if engine.status != 0 and not stop.asked:
            raise EngineFault(f"the engine ended by itself, with status {engine.status}")


class _Stop:
    """Ctrl-C and SIGTERM: drain at first, then end. SIGUSR1: record what the scheduler did lately."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.asked = 0
        self.event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR1, self._record)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.engine is None or not self.engine.address:
            raise KeyboardInterrupt
        self.engine.drain()
        self.event.set()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.engine is not None:
            self.engine.record()


def _watch(engine: Engine, stop: _Stop, live: bool) -> None:
    """Until the engine has ended."""
    said = False
    with ExitStack() as stack:
        view = stack.enter_context(Live(console=stdout(), auto_refresh=False, transient=True))
        client = stack.enter_context(Client(engine.address, name="serve", patience=2.0)) if live else None
        rate = _Rate()
        while engine.status is None:
            if stop.asked and not said:
                said = True
                stderr().print("draining: open requests finish; Ctrl-C again ends them")
            if client is not None and not stop.asked:
                try:
                    view.update(Text.from_markup(rate.line(client.status())), refresh=True)
                except PenstockError as error:
                    view.update(Text(error.message), refresh=True)
            if stop.asked:
                time.sleep(0.05)
            else:
                stop.event.wait(_EVERY)


class _Rate:
    """The line, with tokens a second since the line before."""

    def __init__(self) -> None:
        self._tokens, self._at = 0, time.monotonic()

    def line(self, report: dict[str, Any]) -> str:
        now, tokens = time.monotonic(), int(report.get("tokens", {}).get("generated", 0))
        per_second = (tokens - self._tokens) / max(1e-3, now - self._at)
        self._tokens, self._at = tokens, now
        requests, scheduler = report.get("requests", {}), report.get("scheduler", {})
        parts = [f"[bold]{report.get('state', '?')}[/]", f"{requests.get('open', 0)} open", f"{max(0.0, per_second):,.0f} tok/s"]
        if scheduler.get("blocks_total"):
            parts.append(f"KV {100 * (1 - scheduler.get('blocks_free', 0) / scheduler['blocks_total']):.0f} % in use")
        if scheduler.get("batch_mean"):
            parts.append(f"mean batch {scheduler['batch_mean']:.1f}")
        bad = [f"{row['kind']} {row['state']}" for row in report.get("actors", ()) if row["state"] not in ("ready", "starting")]
        return "  ".join(parts) + ("  [red]" + ", ".join(bad) + "[/]" if bad else "")
