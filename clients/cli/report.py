"""How commands end: errors as one line for people, and an exit status for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from penstock.clients.errors import InvalidRequest, OutputError, PenstockError, Retryable

STATUS_HELP = "Exit status: 0 done, 1 failed, 2 refused input, 74 output cannot be written, 75 try again later, 130 interrupted."


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def reported(interrupted: str = "") -> Iterator[None]:
    """Turns what a command raises into a message and an exit status. `interrupted` is said after Ctrl-C."""
    try:
        yield
    except PenstockError as error:
        stderr().print(f"[red bold]error[/] [bold]{error.code}[/]: {escape(error.message)}")
        if error.retry_after is not None:
            stderr().print(f"try again after {error.retry_after:g} s")
        raise typer.Exit(exit_status(error)) from None
    except KeyboardInterrupt:
        stderr().print(interrupted or "interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


def exit_status(error: PenstockError) -> int:
    match error:
        case InvalidRequest():
            return 2
        case OutputError():
            return 74
        case Retryable():
            return 75
    return 1
