"""Making an adapter ready: from its source to a file in the layout of the device. Everything here blocks: it runs in threads."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from penstock.actors.errors import Refusal, too_many_pages
from penstock.actors.shelf import Shelf
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Limits, Settings, fetch, probe
from penstock.actors.sources.source import Source
from penstock.engine.lora.residency import largest_adapter

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

    @property
    def key(self) -> tuple[str, str, str]:
        """Of what is at it. Folders want no token; and a token is not kept."""
        token = self.token if self.far and self.token is not None else ""
        return self.source.shown, self.source.text, blake2b(token.encode(), digest_size=16).hexdigest()


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
        self.limits, self.pages = limits, facts["pages"]

    def until(self, stop: Event) -> Preparer:
        """This one for a single piece of work, which ends early when `stop` is set."""
        one = copy(self)
        one.limits = replace(self.limits, stop=stop)
        return one

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
        except (AdapterError, OSError):
            return None  # it is made anew

    def again(self, wanted: Wanted, digest: str | None, known: Version | None = None) -> Version:
        """What was made ready before, or what is at its source if that is still the same; without a digest, whatever is there. Raises
        `SourceError` and `AdapterError`."""
        version = self.recall(digest) or self.prepare(wanted, known)
        _check_same(wanted, digest, version.digest, "which is no longer on this machine")
        return version

    def again_for(self, wanted: Wanted, digest: str | None, known: Version | None) -> Version:
        """The same for somebody with a token, if the source lets it in."""
        probe(wanted.source, wanted.token, self.limits, wanted.settings)
        return self.again(wanted, digest, known)

    def merge(self, parts: Sequence[tuple[Wanted, str | None]], recipe: Recipe) -> Version:
        """Several, merged, each of which has this digest if one is given. Raises `SourceError` and `AdapterError`."""
        from penstock.engine.lora.errors import AdapterError, some
        from penstock.engine.lora.merge import merge
        from penstock.engine.lora.read import broken_sites

        loras = []
        for wanted, digest in parts:
            loras.append(self._read(wanted)[0])
            _check_same(wanted, digest, loras[-1].digest, "and a merge is made of what is there")
        if self.limits.stop.is_set():
            raise SourceError("stopped", "the merge is not waited for any more")
        merged = merge(loras, recipe)
        if broken := broken_sites(merged, self.dtype):
            text = f"the merged weights are too large for {self.dtype}: {some(broken)}"
            raise AdapterError("invalid_recipe", text, "weights")
        return self._store(merged, "")

    def _read(self, wanted: Wanted) -> tuple[Lora, str]:
        from penstock.engine.lora.errors import AdapterError
        from penstock.engine.lora.read import read_adapter

        with tempfile.TemporaryDirectory(dir=self.shelf.folder) as into:
            fetched = fetch(wanted.source, Path(into), wanted.token, self.limits, wanted.settings)
            try:
                return read_adapter(Path(into), self.sites, self.limits.file_bytes, self.dtype), fetched.revision
            except AdapterError as error:  # whoever asked knows the source, and nothing of where this looked at it
                raise AdapterError(error.code, error.message.replace(into, wanted.source.shown), error.field) from error

    def _store(self, lora: Lora, revision: str) -> Version:
        from penstock.engine.lora.layout import RANKS
        from penstock.engine.lora.store import write_pages

        pages, most = -(-lora.rank // RANKS), largest_adapter(self.pages)
        if pages > most:  # nothing else has to make room for it on the disk
            raise too_many_pages(pages, most, self.pages)
        if self.recall(lora.digest) is None:  # one that cannot be read is made anew
            write_pages(self.shelf.path(lora.digest), self.layout, lora, self.dtype)
            self.shelf.tidy(keep=lora.digest)
        return Version(lora.digest, pages, lora.rank, str(self.shelf.path(lora.digest)), revision)


def check_one_place(parts: list[Wanted]) -> None:
    """A token is for whoever gave it out, and for nobody else. Raises `Refusal`."""
    places = {(part.source.kind, part.source.place if part.source.kind == "url" else "") for part in parts if part.far}
    if len(places) > 1:
        text = "adapter_token: the adapters to be merged are of several places, and a token is for one"
        raise Refusal("invalid_request", text, field="adapter_token", limit="adapters of one place")


def _check_same(wanted: Wanted, digest: str | None, now: str, why: str) -> None:
    """A name stands for what was loaded under it; `why` that cannot be had. Raises `AdapterError`."""
    from penstock.engine.lora.errors import AdapterError

    if digest is not None and now != digest:
        text = f"{wanted.source.shown} has another adapter now than the one that was loaded from there"
        raise AdapterError("changed_adapter", f"{text}, {why}: load it again")
