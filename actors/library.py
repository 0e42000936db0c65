"""Which adapters are known by a name: those of the settings, and those that were loaded since. It survives the actor that keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.actors.errors import bad
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Source, parse_source
from penstock.engine.open import model_folder

if TYPE_CHECKING:
    from penstock.actors.config import EngineConfig

LONGEST_NAME = 120  # characters


@dataclass(frozen=True, slots=True)
class Title:
    """What a name stands for. `source` is a text, `token` what it wants; `version` the digest that requests get, once it is loaded.
    `pinned`: it is to stay on the device."""

    source: str
    token: str | None = None
    pinned: bool = False
    version: str | None = None


class Library:
    """Titles by name, written to `file` whenever they change: it is in a folder that only the engine's user may read."""

    def __init__(self, config: EngineConfig, file: Path) -> None:
        self.file = file
        self.titles: dict[str, Title] = {name: Title(source) for name, source in configured(config).items()}
        if file.is_file():
            self.titles = {name: Title(**values) for name, values in json.loads(file.read_text()).items()}

    def put(self, name: str, title: Title) -> None:
        self.titles[name] = title
        self._write()

    def remove(self, name: str) -> None:
        if self.titles.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        made = self.file.with_suffix(".new")
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump({name: asdict(title) for name, title in self.titles.items()}, out)
        made.rename(self.file)


def configured(config: EngineConfig) -> dict[str, str]:
    """The sources of the adapters that an engine knows from its start, by name: what lies beside the model in its folder `adapters`, and
    those of the settings. Raises `Refusal`."""
    folder = Path(model_folder(config.model)) / "adapters"
    found = {path.parent.name: str(path.parent.absolute()) for path in sorted(folder.glob("*/adapter_config.json"))}
    for text in config.adapters:
        name, equals, source = text.partition("=")
        if not equals:
            raise bad("adapters", text, "NAME=SOURCE")
        found[check_name(name)] = check_source(source).text
    return found


def check_name(name: str) -> str:
    """Raises `Refusal`."""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or "/" in name or "@" in name or ":" in name or name != name.strip():
        raise bad("name", name, f"1 to {LONGEST_NAME} printable characters without / @ : around which is no space")
    return name


def check_source(text: str) -> Source:
    """Raises `Refusal`."""
    try:
        return parse_source(text)
    except SourceError as error:
        raise bad("source", "", str(error)) from error


def serves_adapters(config: EngineConfig) -> bool:
    """Whether there is any that could be asked for."""
    return config.adapter_pages != 0 and config.executor != "mock" and bool(configured(config) or config.adapter_sources)
