"""The `penstock` command."""

from __future__ import annotations

import typer

from penstock.clients.bench.command import app as bench
from penstock.clients.cli.adapters import app as adapters
from penstock.clients.cli.chat import chat
from penstock.clients.cli.control import drain, restart
from penstock.clients.cli.demo import demo
from penstock.clients.cli.generate import generate
from penstock.clients.cli.keys import app as keys
from penstock.clients.cli.replay import replay
from penstock.clients.cli.report import STATUS_HELP
from penstock.clients.cli.serve import serve
from penstock.clients.cli.status import status

app = typer.Typer(
    name="penstock",
    help="Serve language models through actors, and use them.",
    epilog=STATUS_HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
for command in (serve, generate, chat, status, drain, restart, replay, demo):
    app.command(epilog=STATUS_HELP)(command)

app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")
app.add_typer(adapters, name="adapters")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
