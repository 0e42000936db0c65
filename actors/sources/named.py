"""Adapters by name: what a name may be, and what a setting or an operator says that it stands for."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.actors.errors import bad
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Allowed, Source, parse_allowed, parse_source

LONGEST_NAME = 120  # characters


def named_sources(texts: Iterable[str]) -> dict[str, Source]:
    """Of settings `NAME=SOURCE`. Raises `Refusal`."""
    found: dict[str, Source] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals:
            raise bad("adapters", text, "NAME=SOURCE")
        if check_name(name) in found:
            raise bad("adapters", text, "each of another name")
        found[name] = check_source(source)
    return found


def allowed_sources(texts: Iterable[str]) -> Allowed:
    """Of settings. Raises `Refusal`."""
    try:
        return parse_allowed(texts)
    except SourceError as error:
        raise bad("adapter_sources", "…", f"places: {error.message}") from error


def check_name(name: str) -> str:
    """No name can be taken for a source. Raises `Refusal`."""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or {*"/@:"} & {*name} or name != name.strip():
        raise bad("name", name, f"1 to {LONGEST_NAME} printable characters without / @ : around which is no space")
    return name


def check_source(text: str) -> Source:
    """Raises `Refusal`, which shows no secrets."""
    try:
        return parse_source(text)
    except SourceError as error:
        raise bad("source", "…", f"a source: {error.message}") from error
