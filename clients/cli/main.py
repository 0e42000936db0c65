"""The `penstock` command."""

from __future__ import annotations

import typer

from .chat import chat
from .demo import demo
from .generate import generate
from .report import STATUS_HELP
from .serve import serve
from .status import status

app = typer.Typer(
    name="penstock",
    help="Serve language models through actors, and use them.",
    epilog=STATUS_HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
for command in (serve, generate, chat, status, demo):
    app.command(epilog=STATUS_HELP)(command)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
