"""`penstock chat`: talk to a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from penstock.clients.cli.keys import Key, ServerKey, given_keys
from penstock.clients.cli.options import Adapter, AdapterToken, only_given, with_tables
from penstock.clients.cli.report import reported, stderr, stdout
from penstock.clients.cli.status import Address, Timeout
from penstock.clients.errors import InvalidRequest, PenstockError
from penstock.clients.sync import Client
from penstock.engine.params import PromptOptions, SamplingParams

_HELP = "[dim]/reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer[/dim]"


@with_tables(
    SamplingParams, PromptOptions, panels=("Sampling", "Prompt"), skip=("n", "echo", "continue_final_message", "add_generation_prompt")
)
def chat(
    address: Address = None,
    system: Annotated[str | None, typer.Option(help="what the model is told first", show_default=False)] = None,
    adapter: Adapter = None,
    adapter_token: AdapterToken = None,
    timeout: Timeout = 5.0,
    key: Key = None,
    server_key: ServerKey = None,
    **given: Any,
) -> None:
    """Talk to a model; answers appear as they are made. Reads turns from standard input if that is not a terminal."""
    first = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, str]] = list(first)
    with reported(), Client(address, name="chat", connect_timeout=timeout, keys=given_keys(key, server_key)) as client:
        params = only_given({**given, "adapter": adapter, "adapter_token": adapter_token})
        if sys.stdin.isatty():
            stdout().print(f"[bold]{client.model.get('name', '')}[/]  {_HELP}")
        while (said := _read()) is not None:
            if said == "/exit":
                return
            if said == "/reset":
                messages = list(first)
                continue
            messages.append({"role": "user", "content": said})
            try:
                answer = _answer(client, messages, params)
            except InvalidRequest as error:
                if not sys.stdin.isatty():
                    raise
                stderr().print(f"[red]{error.code}[/]: {error.message}", markup=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    """The next turn that is not empty, or none at the end."""
    while True:
        try:
            said = input("› " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if said:
            return said


def _answer(client: Client, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    """Print an answer as it comes. Ctrl-C keeps what came so far."""
    parts: list[str] = []
    try:
        for chunk in client.chat_stream(messages, **params):
            parts.append(chunk.text)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" …")
    except PenstockError:
        if parts:
            sys.stdout.write("\n")
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(parts)
