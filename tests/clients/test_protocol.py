"""PROTOCOL.md says what the code does: its tables are the code's tables, and its bytes are messages."""

from __future__ import annotations

import re
from array import array
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from penstock.actors import protocol as wire
from penstock.actors.errors import CODES
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY
from penstock.actors.sources.errors import CODES as SOURCE_CODES
from penstock.actors.wire import Catalogue, Limits
from penstock.engine.lora.errors import AdapterError
from penstock.engine.params import InvalidParameter, PromptOptions, SamplingParams

PAGE = (Path(__file__).parents[2] / "clients" / "PROTOCOL.md").read_text(encoding="utf-8")


def limit_of(spec: Any) -> str:
    with pytest.raises(InvalidParameter) as caught:
        spec.metadata["check"](spec.name, object())
    return caught.value.limit


def shown(default: Any) -> str:
    return {"None": "nil", "()": "[]", "True": "true", "False": "false"}.get(repr(default), repr(default))


@pytest.mark.parametrize("table", [SamplingParams, PromptOptions])
def test_parameters_are_those_of_the_table(table: type[Any]) -> None:
    for spec in fields(table):
        limit = limit_of(spec) + (", or nil" if type(None) in get_args(get_type_hints(table)[spec.name]) else "")
        assert f"| `{spec.name}` | {limit} | {shown(spec.default)} | {spec.metadata['help']} |" in PAGE


def test_error_codes_are_those_of_the_table() -> None:
    for code, (retryable, meaning) in CODES.items():
        assert f"| `{code}` | {'yes' if retryable else 'no'} | {meaning} |" in PAGE


def test_what_may_be_wrong_with_an_adapter_and_its_source_is_named() -> None:
    text = PAGE.split("With `adapter_error`")[1].split("\n\n")[0]
    codes = re.findall(r"^ *- (\w+):", AdapterError.__doc__ or "", re.MULTILINE)
    assert len(codes) == 6
    assert {code for code in re.findall(r"`(\w+)`", text) if code != "limit"} == {*codes, *SOURCE_CODES} - {"stopped"}


@pytest.mark.parametrize(("catalogue", "heading"), [(TO_GATEWAY, "## Messages to the engine"), (TO_CLIENT, "## Messages to a client")])
def test_messages_have_the_tags_and_fields_of_the_code(catalogue: Catalogue, heading: str) -> None:
    table = PAGE.split(heading)[1].split("\n\n")[1].splitlines()[2:]
    assert len(table) == len(catalogue._by_tag)
    for row in table:
        tag, name, columns = re.fullmatch(r"\| (\d+) \| `(\w+)` \| (.*) \|", row).groups()  # type: ignore[union-attr]
        kind = catalogue._by_tag[int(tag)].kind
        assert kind.__name__ == name
        assert [column.split("`")[1] for column in columns.split(" · ") if "`" in column] == [spec.name for spec in fields(kind)]


def example(name: str) -> bytes:
    found = re.search(rf"^{name} +((?:[0-9a-f]{{2}} ?)+)$", PAGE, re.MULTILINE)
    assert found is not None
    return bytes.fromhex(found[1])


def test_the_bytes_of_the_page_are_the_messages_that_it_says() -> None:
    for name in ("Hello", "Generate", "Renew", "Goodbye"):
        frame = example(name)
        message = TO_GATEWAY.decode_untrusted(frame, Limits())
        assert type(message).__name__ == name
        assert TO_GATEWAY.encode(message) == frame
    for name in ("Welcome", "Accepted", "Chunks"):
        message = TO_CLIENT.decode(example(name))
        assert type(message).__name__ == name
        assert TO_CLIENT.encode(message) == example(name)
    chunks = TO_CLIENT.decode(example("Chunks"))
    assert isinstance(chunks, wire.Chunks)
    assert (array("i", chunks.ids).tolist(), chunks.texts, chunks.ends) == ([39, 1380], (" A b",), ((1, "length", {}),))
