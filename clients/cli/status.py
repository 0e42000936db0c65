"""`penstock status`: what an engine is doing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from penstock.clients.cli.keys import Key, ServerKey, given_keys
from penstock.clients.cli.report import reported, stdout
from penstock.clients.sync import Client

Address = Annotated[str | None, typer.Option(help="of the engine; none: the one that was started last", show_default=False)]
Timeout = Annotated[float, typer.Option(help="seconds to wait for an engine that is ready")]


def status(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
    timeout: Timeout = 5.0,
    key: Key = None,
    server_key: ServerKey = None,
) -> None:
    """Show what an engine is doing: requests, tokens, steps, the KV cache and each of its actors."""
    with reported(), Client(address, name="status", connect_timeout=timeout, keys=given_keys(key, server_key)) as client:
        report = client.status()
    console = stdout()
    if as_json:
        console.print_json(json.dumps(report)) if console.is_terminal else typer.echo(json.dumps(report))
        return
    console.print(f"[bold]{report.get('state', '?')}[/]  {report.get('model', {}).get('name', '')}")
    console.print(_numbers(report))
    console.print(_actors(report.get("actors", ())))


def _numbers(report: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False, box=None)
    for part in ("requests", "tokens", "scheduler", "adapters"):
        for name, value in report.get(part, {}).items():
            if isinstance(value, int | float):
                shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
                table.add_row(f"{part} {name.replace('_', ' ')}", shown)
    return table


def _actors(rows: Any) -> Table:
    table = Table("actor", "state", "pid", "start", "progress")
    for row in rows:
        color = {"ready": "green", "stalled": "red", "restarting": "yellow"}.get(row["state"], "")
        state = f"[{color}]{row['state']}[/]" if color else row["state"]
        table.add_row(f"{row['kind']} {row['index']}", state, str(row["pid"]), str(row["incarnation"]), f"{row['progress']:,}")
    return table
