"""The adapters actor: what is asked for by name is found, fetched, checked and made ready, many at once, while steps go on without it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.actors.actor import EXECUTOR, GATEWAY, SCHEDULER, Actor, Peer, PeerKey
from penstock.actors.errors import Fault, Refusal, bad
from penstock.actors.library import Library, Title
from penstock.actors.messages import Find, Found, Manage, Managed, Pin
from penstock.actors.preparing import Preparer, Version, Wanted
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Limits, Settings
from penstock.actors.sources.named import allowed_sources, check_name, check_source
from penstock.engine.kernels.cache import cache_folder
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.recipe import Wish
from penstock.engine.params import InvalidParameter

THREADS = 8  # adapters that are made ready at once
FRESH_S = 30.0  # for so long what a source has is taken to be what it had
FAILED_S = 5.0  # and it is not asked again after it failed
MOST_KNOWN = 4096  # versions and failures that are remembered

Key = tuple[str, ...]
Then = Callable[[Version | None, Fault | None], None]


class AdaptersActor(Actor):
    """It holds nothing that cannot be had again: names are in a file of the engine's folder, versions on disk. A gateway asks again when
    this actor is replaced."""

    kind = "adapters"

    def start(self) -> dict[str, Any]:
        config = self.config
        self.settings = Settings(
            allowed=allowed_sources(config.adapter_sources), hub_endpoint=config.hub_endpoint, s3_endpoint=config.s3_endpoint
        )  # fmt: skip
        self.library = Library(config, Path(self.post.directory) / "adapters.json")
        self.folder = Path(config.adapter_cache) if config.adapter_cache else cache_folder() / "adapters"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.facts: dict[str, Any] | None = None  # what the executor's device has: see `Preparer`
        self.preparer: Future[Preparer] | None = None
        self.early: list[Find | Manage] = []  # that came before it was known what to prepare for
        self.versions: dict[Key, tuple[float, Version]] = {}  # when it was known to be what a source has
        self.failures: dict[Key, tuple[float, Fault]] = {}
        self.asked: dict[Key, list[Then]] = {}  # what is under way, and who waits for it
        self.done: list[tuple[Key, Version | None, Fault | None]] = []
        self.counts = {"found": 0, "prepared": 0, "failed": 0}
        self.pool = ThreadPoolExecutor(THREADS, "adapters")
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.mail.watch(self.bell)
        self.handlers |= {Find: self._find, Manage: self._manage}
        return {}

    def finish(self) -> None:
        if hasattr(self, "pool"):
            self.pool.shutdown(wait=False, cancel_futures=True)
            os.close(self.bell)

    def met(self, before: dict[PeerKey, Peer]) -> None:
        executor, scheduler = self.peers.get(EXECUTOR), self.peers.get(SCHEDULER)
        if self.facts is None and executor is not None and executor.ready and executor.facts["adapters"]:
            self.facts = executor.facts["adapters"]
            early, self.early = self.early, []
            for message in early:
                self.handlers[type(message)](message)
            for name, title in self.library.titles.items():
                if title.pinned:  # in another life
                    self._ask_for(name, title, self._wanted(name, None), lambda version, fault: self._send_pins())
        if scheduler is not None and scheduler != before.get(SCHEDULER):
            self._send_pins()

    def after(self) -> None:
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            return
        done, self.done = self.done, []
        for key, version, fault in done:
            if version is not None:
                self.counts["prepared"] += 1
                self.versions[key] = time.monotonic(), version
            elif fault is not None:
                self.counts["failed"] += 1
                self.failures[key] = time.monotonic(), fault
                self.log.warning("adapter not ready", source=key[0], error=fault.message)
            for memory in (self.versions, self.failures):
                if len(memory) > MOST_KNOWN:
                    del memory[next(iter(memory))]
            for then in self.asked.pop(key):
                then(version, fault)

    # ── what requests ask for ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, message: Find) -> None:
        if self.facts is None:
            self.early.append(message)
            return

        def answer(version: Version | None, fault: Fault | None) -> None:
            self.counts["found"] += version is not None
            self.mail.send(GATEWAY, Found(message.job, version.place if version else (), fault.to_wire() if fault else None))

        try:
            wish = Wish.from_wire(message.wish)
            parts = [self._wanted(name, message.token) for name in wish.names]
        except InvalidParameter as error:
            answer(None, Fault(code="invalid_request", message=str(error), field=error.field, value=error.value, limit=error.limit))
            return
        except Refusal as refusal:
            answer(None, refusal.fault)
            return
        if wish.recipe is not None:
            key = (f"merge {wish.text}", repr(wish), *[part.source.text for part in parts], *[part.token or "" for part in parts])
            recipe = wish.recipe
            self._ask(key, lambda preparer: preparer.merge(parts, recipe), answer, FRESH_S if message.token is None else 0.0)
            return
        part, title = parts[0], self.library.titles.get(wish.names[0])
        if title is None or message.token is not None:  # a private token is checked at each use
            known = self._known(part)
            self._ask(self._key(part), lambda preparer: preparer.prepare(part, known), answer, FRESH_S if message.token is None else 0.0)
        else:
            self._ask_for(wish.names[0], title, part, answer)

    def _ask_for(self, name: str, title: Title, part: Wanted, then: Then) -> None:
        """A name stands for what was loaded under it, or, if that was never done, for what its source has now."""

        def keep(version: Version | None, fault: Fault | None) -> None:
            if version is not None and self.library.titles.get(name) == title and title.version != version.digest:
                self.library.put(name, replace(title, version=version.digest))
            then(version, fault)

        self._ask(self._key(part), lambda preparer: preparer.recall(title.version) or preparer.prepare(part, None), keep, None)

    def _wanted(self, name: str, token: str | None) -> Wanted:
        """What a name stands for: an adapter that is known by it, or a source, if those may be named. Raises `Refusal`."""
        title = self.library.titles.get(name)
        if title is not None:
            source = check_source(title.source)
            return Wanted(source, token or title.token, replace(self.settings, allowed=self.settings.allowed.plus(source)))
        if not self.config.adapter_sources:
            raise _unknown(name, self.library)
        try:
            source = check_source(name)
        except Refusal as refusal:
            raise _unknown(name, self.library) from refusal
        return Wanted(source, token, self.settings)

    def _ask(self, key: Key, work: Callable[[Preparer], Version], then: Then, fresh: float | None) -> None:
        """Have something made ready, unless it is known for less than `fresh` seconds, or at all; nobody does the same twice at once."""
        now = time.monotonic()
        if key in self.asked:
            self.asked[key].append(then)
            return
        when, version = self.versions.get(key, (0.0, None))
        if version is not None and (fresh is None or now - when < fresh) and Path(version.path).is_file():
            then(version, None)
            return
        when, fault = self.failures.get(key, (0.0, None))
        if fault is not None and now - when < FAILED_S:
            then(None, fault)
            return
        self.asked[key] = [then]
        if self.preparer is None and self.facts is not None:  # not before: it takes seconds of CPU, and many an engine never needs it
            limits = Limits(file_bytes=self.config.adapter_size, total=self.config.adapter_timeout)
            self.preparer = self.pool.submit(Preparer, self.facts, self.folder, self.config.adapter_disk, limits)
        if self.preparer is not None:
            self.pool.submit(self._work, key, work, self.preparer)

    def _work(self, key: Key, work: Callable[[Preparer], Version], preparer: Future[Preparer]) -> None:
        """On a thread."""
        version, fault = None, None
        try:
            version = work(preparer.result())
        except SourceError as error:
            fault = Fault(code="adapter_error", message=error.message, field="adapter", limit=error.code, retryable=error.retry)
        except AdapterError as error:
            fault = Fault(code="adapter_error", message=error.message, field=error.field or "adapter", limit=error.code)
        except Exception as error:  # noqa: BLE001  nobody watches this thread, and who waits must hear of it
            fault = Fault(code="engine_fault", message=f"{type(error).__name__}: {error}", actor=self.kind)
        self.done.append((key, version, fault))
        os.eventfd_write(self.bell, 1)

    @staticmethod
    def _key(part: Wanted) -> Key:
        return part.source.shown, part.source.text, part.token or ""

    def _known(self, part: Wanted) -> Version | None:
        found = self.versions.get(self._key(part))
        return None if found is None else found[1]

    # ── what operators order ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _manage(self, message: Manage) -> None:
        if self.facts is None:
            self.early.append(message)
            return
        try:
            match message.order:
                case "list":
                    self._tell(message, None)
                case "load":
                    self._load(message)
                case "unload":
                    self._title(message.name)
                    self.library.remove(message.name)
                    self._send_pins()
                    self._tell(message, None)
                case "pin":
                    self._pin(message)
                case "unpin":
                    self.library.put(message.name, replace(self._title(message.name), pinned=False))
                    self._send_pins()
                    self._tell(message, None)
                case _:
                    raise bad("order", message.order, "load, unload, pin, unpin or list")
        except Refusal as refusal:
            self._tell(message, refusal.fault)

    def _title(self, name: str) -> Title:
        title = self.library.titles.get(name)
        if title is None:
            raise _unknown(name, self.library)
        return title

    def _load(self, message: Manage) -> None:
        """Under a name that is new, or to take the place of what has it: streams of that go on with what they have."""
        name, before = check_name(message.name), self.library.titles.get(message.name)
        if message.source is None and before is None:
            raise bad("source", None, f"given, since nothing is known by the name {message.name[:120]!r}")
        source = check_source(message.source) if message.source is not None else check_source(before.source if before else "")
        token = message.token or (before.token if before is not None and message.source is None else None)
        named = any(title.source == source.text for title in self.library.titles.values())
        part = Wanted(source, token, replace(self.settings, allowed=self.settings.allowed.plus(source)) if named else self.settings)
        known = self._known(part)

        def then(version: Version | None, fault: Fault | None) -> None:
            if version is not None:
                pinned = before is not None and before.pinned
                self.library.put(name, Title(source.text, token, pinned, version.digest))
                self._send_pins()
            self._tell(message, fault)

        self.failures.pop(self._key(part), None)
        self._ask(self._key(part), lambda preparer: preparer.prepare(part, known), then, 0.0)

    def _pin(self, message: Manage) -> None:
        title = self._title(message.name)
        part = self._wanted(message.name, None)

        def then(version: Version | None, fault: Fault | None) -> None:
            title = self.library.titles.get(message.name)
            if version is not None and title is not None:
                others = sum(pages for digest, pages, _ in self._pins() or () if digest.hex() != version.digest)
                most = (self.facts["pages"] if self.facts is not None else 0) // 2
                if others + version.pages > most:
                    text = f"{others} pages are pinned, and {message.name!r} takes {version.pages}: others must fit beside them"
                    fault = Fault(code="invalid_request", message=text, field="adapter", limit=f"{most} pages")
                else:
                    self.library.put(message.name, replace(title, pinned=True))
                    self._send_pins()
            self._tell(message, fault)

        self._ask_for(message.name, title, part, then)

    def _pins(self) -> list[tuple[bytes, int, str]] | None:
        """Places of all that is pinned; None while it is not known of each of them."""
        places = {}
        for name in [name for name, title in self.library.titles.items() if title.pinned]:
            version = self._known(self._wanted(name, None))
            if version is None:
                return None
            places[version.digest] = version.place
        return list(places.values())

    def _send_pins(self) -> None:
        if (places := self._pins()) is not None:
            self.mail.send(SCHEDULER, Pin(tuple(places)))

    def _tell(self, message: Manage, fault: Fault | None) -> None:
        rows = tuple([self._row(name, title) for name, title in self.library.titles.items()])
        self.mail.send(GATEWAY, Managed(message.job, rows, fault.to_wire() if fault is not None else None))

    def _row(self, name: str, title: Title) -> dict[str, Any]:
        part = self._wanted(name, None)
        key, version = self._key(part), self._known(part)
        state = "loading" if key in self.asked else "host" if version is not None else "failed" if key in self.failures else "cold"
        row = {"name": name, "source": part.source.shown, "state": state, "pinned": title.pinned}
        if version is not None:
            row |= {"digest": version.digest, "rank": version.rank, "pages": version.pages}
        elif state == "failed":
            row["error"] = self.failures[key][1].message
        return row

    def load(self) -> dict[str, Any]:
        return {"known": len(self.library.titles), "under_way": len(self.asked), **self.counts}


def _unknown(name: str, library: Library) -> Refusal:
    known = ", ".join(sorted(library.titles)[:20]) or "none"
    return Refusal("unknown_adapter", f"no adapter {name[:120]!r} is known", field="adapter", value=name[:120], limit=f"one of: {known}")
