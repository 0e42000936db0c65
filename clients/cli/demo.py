"""`penstock demo`: the main job at a glance. Starts an engine, streams from it with many clients' worth of requests, shows figures."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.chaos import known_adapters
from penstock.clients.cli.report import reported, stdout
from penstock.clients.cli.side_by_side import MOST, QUESTION, answers, show
from penstock.clients.launcher import alaunch

_OPENING = "The Python tutorial introduces the reader informally to the basic concepts and features of the language. "
_PROMPTS = (
    "A list is", "The function returns", "Dictionaries are", "def fibonacci(n):\n", "When an exception occurs,", "A generator is",
    "The module provides", "Classes provide a means of", "import os\n\n", "Strings can be", "The for statement", "A set is",
    "To read a file,", "The with statement", "Iterators are", "class Stack:\n",
)  # fmt: skip
_REFRESH = 0.1  # seconds
_LOOKS = 5
_SHOWN = 260  # characters of a stream's end


@dataclass
class _Seen:
    """What one stream has shown so far. Times are seconds."""

    prompt: str
    begun: float = 0.0
    text: str = ""
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    reason: str | None = None

    def take(self, text: str, tokens: int, now: float) -> None:
        if tokens and self.first is None:
            self.first = now - self.begun
        elif tokens:
            self.gaps += [(now - self.last) / tokens] * tokens
        self.text, self.tokens = self.text + text, self.tokens + tokens
        self.last = now if tokens else self.last


def demo(
    streams: Annotated[int, typer.Option(min=1, max=256, help="requests at once")] = 12,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens each")] = 160,
    model: Annotated[str, typer.Option(help="a folder, a hub id, or `tiny`, the model in the package")] = "tiny",
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    plain: Annotated[bool, typer.Option("--plain", help="lines instead of a live view")] = False,
) -> None:
    """Start an engine, stream from it with many requests at once, and end with a table of what happened."""
    with reported():
        asyncio.run(_demo(streams, max_tokens, model, temperature, plain))


async def _demo(streams: int, max_tokens: int, model: str, temperature: float, plain: bool) -> None:
    console = stdout()
    begun = time.perf_counter()
    console.print(f"starting an engine with the model [bold]{model}[/] …")
    async with alaunch(model) as client:
        startup = time.perf_counter() - begun
        console.print(f"ready after {startup:.1f} s: {streams} requests at once, {max_tokens} tokens each")
        seen = [_Seen(_PROMPTS[index % len(_PROMPTS)]) for index in range(streams)]
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            # The first one leaves its opening in the prefix cache for the others.
            readers = [tasks.create_task(_read(client, one, index, max_tokens, temperature)) for index, one in enumerate(seen)]
            if console.is_terminal and not plain:
                await _show(console, seen, readers)
        seconds = time.perf_counter() - begun
        report = await _settled(client)
        names = (await known_adapters(client))[:MOST]
        said = await answers(client, names) if names else {}
    if not console.is_terminal or plain:
        for index, one in enumerate(seen):
            console.print(f"[{index:>2}] {one.prompt}{one.text}".replace("\n", "\n     "), markup=False)
    console.print(_table(seen, seconds, startup, report))
    if said:
        console.print(f"one prompt ({QUESTION!r}), {len(names)} adapters, one batch:")
        show(console, said)


async def _settled(client: AsyncClient) -> dict[str, Any]:
    """The engine's report, once it knows of all that was done: actors tell what they did about once a second."""
    before, report = {"steps": -1}, await client.status()
    for _ in range(_LOOKS):
        if before == report.get("scheduler"):
            break
        before = report.get("scheduler", {})
        await asyncio.sleep(1.2)
        report = await client.status()
    return report


async def _read(client: AsyncClient, seen: _Seen, index: int, max_tokens: int, temperature: float) -> None:
    seen.begun = time.perf_counter()
    stream = client.stream(_OPENING + seen.prompt, max_tokens=max_tokens, temperature=temperature, seed=index, request=f"demo-{index}")
    async for chunk in stream:
        seen.take(chunk.text, len(chunk.ids), time.perf_counter())
        seen.reason = chunk.finish_reason


async def _show(console: Console, seen: list[_Seen], readers: list[asyncio.Task[None]]) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as view:
        while True:
            done = all(reader.done() for reader in readers)
            view.update(_panels(console, seen), refresh=True)
            if done:
                return
            await asyncio.sleep(_REFRESH)


def _panels(console: Console, seen: list[_Seen]) -> Columns:
    across = max(1, min(4, console.width // 38))
    width = console.width // across - 1
    rows = max(1, -(-len(seen) // across))
    height = max(4, min(9, (console.height - 2) // rows))
    panels = []
    for one in seen:
        text = Text(one.prompt, style="bold cyan") + Text(one.text, style="default")
        text = text if len(text) <= _SHOWN else Text("…") + text[-_SHOWN:]
        wrapped = text.wrap(console, width - 4)[-(height - 2) :]
        title = f"{one.tokens} tokens" + (f" · {one.reason}" if one.reason else "")
        panels.append(
            Panel(Text("\n").join(wrapped), title=title, width=width, height=height, border_style="green" if one.reason else "blue")
        )
    return Columns(panels, padding=0)


def _table(seen: list[_Seen], seconds: float, startup: float, report: dict[str, Any]) -> Table:
    scheduler = report.get("scheduler", {})
    tokens = sum(one.tokens for one in seen)
    first = sorted(one.first for one in seen if one.first is not None)
    gaps = sorted(gap for one in seen for gap in one.gaps)
    asked = scheduler.get("prefix_query_tokens", 0)
    hits = f"{scheduler.get('prefix_hit_tokens', 0):,} of {asked:,} prompt tokens" if asked else "-"
    table = Table(title="penstock", show_header=False)
    for name, value in (
        ("requests", f"{len(seen)}"),
        ("tokens", f"{tokens:,}"),
        ("tokens a second", f"{tokens / seconds:,.0f}"),
        ("time to first token, p50 / p99", f"{_ms(first, 0.5)} / {_ms(first, 0.99)}"),
        ("gap between tokens, p50 / p99", f"{_ms(gaps, 0.5)} / {_ms(gaps, 0.99)}"),
        ("steps", f"{scheduler.get('steps', 0):,}"),
        ("mean batch", f"{scheduler.get('batch_mean', 0):.1f}"),
        ("prefix-cache hits", hits),
        ("engine start", f"{startup:.1f} s"),
    ):
        table.add_row(name, value)
    return table


def _ms(values: list[float], share: float) -> str:
    return f"{1000 * values[min(len(values) - 1, int(share * len(values)))]:.1f} ms" if values else "-"
