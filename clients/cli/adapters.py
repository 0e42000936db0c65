"""`penstock adapters`: the LoRA adapters of an engine that runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from penstock.clients.cli.keys import Key, ServerKey, given_keys
from penstock.clients.cli.report import STATUS_HELP, reported, stdout
from penstock.clients.cli.status import Address, Timeout
from penstock.clients.sync import Client

app = typer.Typer(help="The LoRA adapters of an engine that runs.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="the name that requests use")]
Token = Annotated[str | None, typer.Option(help="what the source wants", envvar="PENSTOCK_ADAPTER_TOKEN", show_default=False)]
COLUMNS = ("name", "state", "pinned", "rank", "pages", "running", "waiting", "tokens", "source")


def _client(address: str | None, timeout: float, key: Any, server_key: Any) -> Client:
    return Client(address, name="adapters", connect_timeout=timeout, keys=given_keys(key, server_key))


@app.command("list", epilog=STATUS_HELP)
def list_(address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None) -> None:
    """What adapters there are, and where they are now."""
    with reported(), _client(address, timeout, key, server_key) as client:
        rows = client.adapters()
    table = Table(*COLUMNS, box=None)
    for row in rows:
        shown = {**row, "pinned": "yes" if row["pinned"] else "", "source": row.get("error") or row["source"]}
        table.add_row(*[str(shown.get(name, "")) for name in COLUMNS])
    stdout().print(table if rows else "no adapter is known by name")


@app.command(epilog=STATUS_HELP)
def load(
    name: Name,
    source: Annotated[
        str | None, typer.Argument(help="a folder, org/name, s3://… or a URL; none: what is there now", show_default=False)
    ] = None,
    token: Token = None, address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None,
) -> None:  # fmt: skip
    """Make an adapter ready under a name. Streams of one that had it go on with that."""
    with reported(), _client(address, timeout, key, server_key) as client:
        row = client.load_adapter(name, source, token=token)
    stdout().print(f"{name}: rank {row.get('rank')}, {row.get('pages')} pages, {str(row.get('digest'))[:12]}")


@app.command(epilog=STATUS_HELP)
def unload(name: Name, address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None) -> None:
    """Forget a name. Streams that have begun go on."""
    with reported(), _client(address, timeout, key, server_key) as client:
        client.unload_adapter(name)
    stdout().print(f"{name} is not known any more")


@app.command(epilog=STATUS_HELP)
def pin(name: Name, address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None) -> None:
    """Keep an adapter on the device."""
    with reported(), _client(address, timeout, key, server_key) as client:
        row = client.pin_adapter(name)
    stdout().print(f"{name} stays on the device: {row.get('pages')} pages")


@app.command(epilog=STATUS_HELP)
def unpin(name: Name, address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None) -> None:
    """Let an adapter go when its pages are needed."""
    with reported(), _client(address, timeout, key, server_key) as client:
        client.pin_adapter(name, pinned=False)
    stdout().print(f"{name} may go when its pages are needed")
