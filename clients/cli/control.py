"""`penstock drain` and `penstock restart`: orders to an engine that runs."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.clients.cli.keys import Key, ServerKey, given_keys
from penstock.clients.cli.report import reported, stdout
from penstock.clients.cli.status import Address, Timeout
from penstock.clients.sync import Client

Actor = Annotated[str, typer.Argument(help="executor, scheduler, gateway, tokenizer or detokenizer; tokenizer/1 is the second of several")]


def drain(address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None) -> None:
    """Let an engine finish what is open, take nothing new, and end. Returns once it has begun to."""
    with reported(), Client(address, name="drain", connect_timeout=timeout, keys=given_keys(key, server_key)) as client:
        count = client.drain()
    stdout().print(f"draining: {count} open" if count else "draining: nothing is open")


def restart(actor: Actor, address: Address = None, timeout: Timeout = 5.0, key: Key = None, server_key: ServerKey = None) -> None:
    """Replace one actor of an engine. No stream is lost. Returns once the new one is ready."""
    with reported(), Client(address, name="restart", connect_timeout=timeout, keys=given_keys(key, server_key)) as client:
        row = client.restart(actor)
    stdout().print(f"{row['kind']} {row['index']} is ready again: process {row['pid']}, start {row['incarnation']}")
