"""Which adapters are known by a name: those of the settings, and those that were loaded since. It survives the actor that keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.actors.sources.named import named_sources
from penstock.engine.open import model_folder

if TYPE_CHECKING:
    from penstock.actors.config import EngineConfig

MOST_VERSIONS = 16  # of a name, that streams which have begun may go on with


@dataclass(frozen=True, slots=True)
class Title:
    """What a name stands for. `source` is a text, `token` what it wants; `versions` are the digests of what it has stood for, the one that
    requests get last, once that is known, and `pages` what that takes. `pinned`: it is to stay on the device."""

    source: str
    token: str | None = None
    pinned: bool = False
    versions: tuple[str, ...] = ()
    pages: int = 0

    @property
    def version(self) -> str | None:
        return self.versions[-1] if self.versions else None

    def again(self, version: str, pages: int, before: Title | None) -> Title:
        """With this version, in the place of what the name stood for."""
        old = [other for other in (before.versions if before is not None else ()) if other != version]
        pinned = before is not None and before.pinned
        return replace(self, versions=(*old, version)[-MOST_VERSIONS:], pages=pages, pinned=pinned)


class Library:
    """Titles by name, written to `file` whenever they change: it is in a folder that only the engine's user may read. `unsaved` says why
    they were not, if they were not: then they hold for as long as the actor lives."""

    def __init__(self, config: EngineConfig, file: Path) -> None:
        self.file, self.unsaved = file, ""
        self.titles: dict[str, Title] = {name: Title(source) for name, source in configured(config).items()}
        if file.is_file():
            found = json.loads(file.read_text())
            self.titles = {name: Title(**{**values, "versions": tuple(values["versions"])}) for name, values in found.items()}

    def put(self, name: str, title: Title) -> None:
        self.titles[name] = title
        self._write()

    def remove(self, name: str) -> None:
        if self.titles.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        made = self.file.with_suffix(".new")
        try:
            with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                json.dump({name: asdict(title) for name, title in self.titles.items()}, out)
            made.rename(self.file)
            self.unsaved = ""
        except OSError as error:  # a disk that is full, say: whoever asked for an adapter gets it all the same
            self.unsaved = str(error)


def configured(config: EngineConfig) -> dict[str, str]:
    """The sources of the adapters that an engine knows from its start, by name: what lies beside the model in its folder `adapters`, and
    those of the settings."""
    folder = Path(model_folder(config.model)) / "adapters"
    found = {path.parent.name: os.path.realpath(path.parent) for path in sorted(folder.glob("*/adapter_config.json"))}
    return found | {name: source.text for name, source in named_sources(config.adapters).items()}


def serves_adapters(config: EngineConfig) -> bool:
    """Whether there is any that could be asked for."""
    return config.adapter_pages != 0 and config.executor != "mock" and bool(configured(config) or config.adapter_sources)
