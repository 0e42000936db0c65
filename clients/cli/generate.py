"""`penstock generate`: complete one prompt, or a file of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from penstock.clients.cli.keys import Key, ServerKey, given_keys
from penstock.clients.cli.options import Adapter, AdapterToken, only_given, with_tables
from penstock.clients.cli.report import reported, stderr
from penstock.clients.cli.status import Address, Timeout
from penstock.clients.errors import InvalidRequest
from penstock.clients.jsonl import Output, Row, read_rows, result_row
from penstock.clients.sync import Client
from penstock.clients.values import Outcome
from penstock.engine.params import PromptOptions, SamplingParams


@with_tables(SamplingParams, PromptOptions, panels=("Sampling", "Prompt"))
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the text to complete; none: `--input`", show_default=False)] = None,
    address: Address = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="a file of JSON lines: a text, or a map with `prompt`, `messages` or `ids`, perhaps an `id`, and parameters of its own",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="where results go, a JSON line each; lines that are there already are not made again", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="write over an output file")] = False,
    concurrency: Annotated[int, typer.Option(help="prompts at once")] = 64,
    in_order: Annotated[bool, typer.Option("--in-order/--as-completed", help="the order of results")] = True,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="put token ids into the results")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message to a chat model")] = False,
    adapter: Adapter = None,
    adapter_token: AdapterToken = None,
    timeout: Timeout = 5.0,
    key: Key = None,
    server_key: ServerKey = None,
    **given: Any,
) -> None:
    """Complete one prompt, its text appearing as it is made; or a file of prompts, with a bounded number at once. A run that was
    interrupted is carried on by the same command."""
    with reported(interrupted="interrupted: the same command carries on" if output is not None else ""):
        if (prompt is None) == (input is None) or (input is None) != (output is None):
            raise InvalidRequest("give a prompt, or --input and --output")
        with Client(address, name="generate", connect_timeout=timeout, keys=given_keys(key, server_key)) as client:
            params = only_given({**given, "adapter": adapter, "adapter_token": adapter_token})
            if input is not None and output is not None:
                _batch(client, input, output, fresh, concurrency, in_order, token_ids, params)
            else:
                _one(client, prompt or "", chat, params)


def _one(client: Client, prompt: str, chat: bool, params: dict[str, Any]) -> None:
    many = params.get("n", 1) > 1
    stream = client.chat_stream([{"role": "user", "content": prompt}], **params) if chat else client.stream(prompt, **params)
    if many:
        for index, sample in enumerate(stream.completion().samples):
            sys.stdout.write(f"[{index}] {sample.text}\n")
        return
    for chunk in stream:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _batch(
    client: Client, input: Path, output: Path, fresh: bool, concurrency: int, in_order: bool, token_ids: bool, params: dict[str, Any]
) -> None:
    failed = finished = tokens = 0
    with Output(output, fresh=fresh) as results, _open(input) as source:
        total = _count(source)
        rows: dict[int, Row] = {}
        with _progress() as progress:
            bar = progress.add_task("prompts", total=total, completed=len(results.done), tokens=0, failed=0)
            for outcome in client.map(_prompts(source, results, rows), concurrency=concurrency, ordered=in_order, **params):
                row = rows.pop(outcome.index)
                if row.error is not None:
                    outcome = Outcome(outcome.index, None, error=row.error)
                results.write(result_row(row.id, outcome, token_ids))
                finished += 1
                failed += outcome.completion is None
                tokens += outcome.completion.usage.generated_tokens if outcome.completion is not None else 0
                progress.update(bar, advance=1, tokens=tokens, failed=failed)
    skipped = f", {len(results.done)} were there already" if results.done else ""
    stderr().print(f"{finished} prompts done, {failed} of them failed{skipped}; {tokens:,} tokens")
    if failed:
        raise typer.Exit(1)


def _prompts(source: BinaryIO, results: Output, rows: dict[int, Row]) -> Iterator[Any]:
    """What `map` takes; remembers the row of each index. A line that is no prompt fails as an empty one does, and is reported as itself."""
    for index, row in enumerate(read_rows(source, results.done)):
        rows[index] = row
        yield row.arguments if row.error is None else ""


def _open(path: Path) -> BinaryIO:
    if str(path) == "-":
        return sys.stdin.buffer
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="input", value=str(path), limit=error.strerror) from None


def _count(source: BinaryIO) -> int | None:
    """Lines with something in them, for the progress bar, if the file can be read twice."""
    if not source.seekable():
        return None
    total = sum(1 for line in source if line.strip())
    source.seek(0)
    return total


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TextColumn("{task.fields[failed]} failed"))
    return Progress(*columns, TimeRemainingColumn(), console=stderr(), disable=not sys.stderr.isatty())
