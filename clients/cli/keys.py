"""`penstock keys`: make keys; and the options of commands that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.actors.errors import Refusal
from penstock.actors.keys import new_pair, read_public
from penstock.clients.cli.report import STATUS_HELP, reported, stdout
from penstock.clients.errors import InvalidRequest, from_wire
from penstock.clients.link import Keys

Key = Annotated[Path | None, typer.Option(help="file of your secret key, for an engine that asks for one", show_default=False)]
ServerKey = Annotated[str | None, typer.Option(help="the engine's public key: its file, or the key itself", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="where the two files go", show_default=False)]

app = typer.Typer(help="Make the keys with which an engine and its clients know each other.", no_args_is_help=True)
new = typer.Typer(help="Make a pair of keys: NAME.key is public, NAME.key_secret is for its owner alone.", no_args_is_help=True)
app.add_typer(new, name="new")


@new.command(epilog=STATUS_HELP)
def server(folder: Folder, name: Annotated[str, typer.Option(help="of the files")] = "server") -> None:
    """Make an engine's pair. Clients need its public key."""
    public, secret = _make(folder, name)
    stdout().print(f"the engine: penstock serve --secret-key {secret} --client-keys FOLDER --address tcp://HOST:PORT")
    stdout().print(f"its clients: --server-key {public}, or --server-key '{read_public(public)}'", markup=False)


@new.command(epilog=STATUS_HELP)
def client(folder: Folder, name: Annotated[str, typer.Option(help="of the user: requests are counted for it", show_default=False)]) -> None:
    """Make a client's pair. Its public key goes into the engine's folder of client keys, where it is seen at once."""
    public, secret = _make(folder, name)
    stdout().print(f"the engine: copy {public} into the folder that it was given as --client-keys; remove it there to revoke it")
    stdout().print(f"this client: --key {secret}")


def given_keys(key: Path | None, server_key: str | None) -> Keys | None:
    """The keys that a command was given. Raises `InvalidRequest` for one without the other."""
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        raise InvalidRequest("give both --key and --server-key", field="key" if key is None else "server_key", limit="both, or none")
    return Keys.load(key, server_key)


def _make(folder: Path, name: str) -> tuple[Path, Path]:
    with reported():
        try:
            return new_pair(folder, name)
        except Refusal as refusal:
            raise from_wire(refusal.fault.to_wire()) from None
