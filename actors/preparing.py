"""Making an adapter ready: from its source to a file in the layout of the device. Everything here blocks: it runs in threads."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.actors.shelf import Shelf
from penstock.actors.sources.fetch import Limits, Settings, fetch, probe
from penstock.actors.sources.source import Source

if TYPE_CHECKING:
    from penstock.engine.lora.layout import PageLayout
    from penstock.engine.lora.read import Lora
    from penstock.engine.lora.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Version:
    """An adapter that is ready: `digest` of its content, hexadecimal, and its pages in the file `path`. `revision` is what its source
    called it."""

    digest: str
    pages: int
    rank: int
    path: str
    revision: str = ""

    @property
    def place(self) -> tuple[bytes, int, str]:
        """As messages have it."""
        return bytes.fromhex(self.digest), self.pages, self.path


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source, and the token that it is asked with."""

    source: Source
    token: str | None
    settings: Settings

    @property
    def far(self) -> bool:
        """Whether it may take as long as somebody else's machine takes."""
        return self.source.kind != "local"


class Preparer:
    """For the model whose executor told these `facts` (`Adapters.facts`). Imports torch."""

    def __init__(self, facts: dict[str, Any], folder: Path, disk: int, limits: Limits) -> None:
        import torch

        from penstock.engine.lora.layout import layout_from

        torch.set_num_threads(1)  # the cores are the executor's
        self.layout: PageLayout = layout_from(facts["groups"])
        self.sites = {site.name: site for site in self.layout.sites}
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        self.shelf = Shelf(folder / f"{self.layout.digest}-{facts['dtype']}", disk)
        self.limits = limits

    def prepare(self, wanted: Wanted, known: Version | None) -> Version:
        """What is at a source now; `known` is what was there before. Raises `SourceError` and `AdapterError`."""
        if known is not None:
            revision = probe(wanted.source, wanted.token, self.limits, wanted.settings)
            if revision and revision == known.revision and self.shelf.find(known.digest):
                return known
        lora, revision = self._read(wanted)
        return self._store(lora, revision)

    def recall(self, digest: str | None) -> Version | None:
        """What was made ready before, in another life of this actor perhaps; None if it is not there any more."""
        from penstock.engine.lora.errors import AdapterError
        from penstock.engine.lora.store import read_size

        if digest is None or (path := self.shelf.find(digest)) is None:
            return None
        try:
            return Version(digest, *read_size(path), str(path))
        except AdapterError:
            return None  # it is made anew

    def recall_for(self, wanted: Wanted, digest: str | None) -> Version:
        """What was made ready before, for somebody with a token, if the source lets it in; else what is there now."""
        probe(wanted.source, wanted.token, self.limits, wanted.settings)
        return self.recall(digest) or self.prepare(wanted, None)

    def merge(self, parts: Sequence[Wanted], recipe: Recipe) -> Version:
        """Several, merged. Raises `SourceError` and `AdapterError`."""
        from penstock.engine.lora.merge import merge

        return self._store(merge([self._read(part)[0] for part in parts], recipe), "")

    def _read(self, wanted: Wanted) -> tuple[Lora, str]:
        from penstock.engine.lora.errors import AdapterError
        from penstock.engine.lora.read import read_adapter

        with tempfile.TemporaryDirectory(dir=self.shelf.folder) as into:
            fetched = fetch(wanted.source, Path(into), wanted.token, self.limits, wanted.settings)
            try:
                return read_adapter(Path(into), self.sites, self.limits.file_bytes), fetched.revision
            except AdapterError as error:  # whoever asked knows the source, and nothing of where this looked at it
                raise AdapterError(error.code, error.message.replace(into, wanted.source.shown), error.field) from error

    def _store(self, lora: Lora, revision: str) -> Version:
        from penstock.engine.lora.layout import RANKS
        from penstock.engine.lora.store import write_pages

        if self.recall(lora.digest) is None:  # one that cannot be read is made anew
            write_pages(self.shelf.path(lora.digest), self.layout, lora, self.dtype)
            self.shelf.tidy(keep=lora.digest)
        return Version(lora.digest, -(-lora.rank // RANKS), lora.rank, str(self.shelf.path(lora.digest)), revision)
