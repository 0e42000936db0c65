"""Prompts from a JSON-lines file, results into another: written whole line by whole line, and carried on after an interruption."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from penstock.clients.errors import InvalidRequest, OutputError
from penstock.clients.order import refuse
from penstock.clients.values import Completion, Outcome

RowId = int | str


class Row:
    """One prompt: its id (the field `id`, else the number of its line from 1) and the arguments of `generate`. `error` is set instead
    of arguments if the line is none: it then fails by itself."""

    __slots__ = ("arguments", "error", "id")

    def __init__(self, number: int, line: bytes) -> None:
        self.id: RowId = number
        self.arguments: dict[str, Any] = {}
        self.error: InvalidRequest | None = None
        try:
            row = json.loads(line)
        except ValueError as error:
            self.error = InvalidRequest(f"line {number} is not JSON: {error}", field=f"line {number}", value=repr(line[:120]))
            return
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            self.error = refuse(f"line {number}", row, "a JSON text, or a map with a prompt, messages or ids")
            return
        given = row.pop("id", number)
        if isinstance(given, bool) or not isinstance(given, int | str):
            self.error = refuse(f"line {number}: id", given, "text or an integer")
            return
        self.id, self.arguments = given, row
        if "ids" in row:
            row["prompt"] = row.pop("ids")


def read_rows(source: BinaryIO, done: set[RowId]) -> Iterator[Row]:
    """The rows that are not done yet; empty lines do not count as rows, but as lines. Raises `InvalidRequest` if two have the same id."""
    seen: set[RowId] = set()
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        row = Row(number, line)
        if row.id in seen:
            raise InvalidRequest(f"line {number} has the id {row.id!r}, which an earlier line has", field="id", value=repr(row.id)[:120])
        seen.add(row.id)
        if row.id not in done:
            yield row


class Output:
    """The file of results. What an earlier run wrote is kept, but for a last line that it could not finish; `done` are the ids in it.
    Raises `OutputError` if the file cannot be written, or holds something else than results."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path, self.done = path, set[RowId]()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise self._error(error) from error
        self._regular = stat.S_ISREG(os.fstat(self._file).st_mode)
        self._end = 0
        try:
            if self._regular:
                self._take_up()
        except BaseException:
            os.close(self._file)
            raise

    def write(self, row: dict[str, Any]) -> None:
        """Add a line. If the disk is full the file keeps its whole lines only, so that a later run carries on from there."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            if self._regular:
                os.ftruncate(self._file, self._end)
            raise self._error(error) from error
        self._end += len(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            os.close(self._file)
        except OSError as failed:  # some file systems say only now that the disk is full
            raise self._error(failed) from failed

    def _take_up(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.done.add(json.loads(line)["id"])
                except (ValueError, KeyError, TypeError) as error:
                    text = f"line {number} of {self.path} is not a result: give another file, or --fresh to write over it"
                    raise OutputError(text, field="output", value=str(self.path)) from error
                self._end += len(line)
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)

    def _error(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror}", field="output", value=str(self.path), limit=error.strerror)


def result_row(id: RowId, outcome: Outcome, ids: bool) -> dict[str, Any]:
    """The line for an outcome: text, finish_reason and usage of it (and with `ids` the token ids), or its error."""
    if outcome.completion is None:
        error = outcome.error.to_map() if outcome.error is not None else {}
        return {"id": id, "error": error}
    completion = outcome.completion
    row: dict[str, Any] = {"id": id, **_sample(completion, 0, ids)}
    if len(completion.samples) > 1:
        row["samples"] = [_sample(completion, index, ids) for index in range(len(completion.samples))]
    usage = completion.usage
    row["usage"] = {name: getattr(usage, name) for name in ("prompt_tokens", "cached_tokens", "generated_tokens")}
    row["seed"] = completion.seed
    return row


def _sample(completion: Completion, index: int, ids: bool) -> dict[str, Any]:
    sample = completion.samples[index]
    row: dict[str, Any] = {"text": sample.text, "finish_reason": sample.finish_reason}
    if ids:
        row["ids"] = sample.ids
    if sample.logprobs is not None:
        row["logprobs"] = [[one.id, one.logprob, one.rank, one.top] for one in sample.logprobs]
    return row
