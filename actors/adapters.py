"""The adapters actor: what is asked for by name is found, fetched, checked and made ready, many at once, while steps go on without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.actors.actor import EXECUTOR, GATEWAY, SCHEDULER, Actor, Peer, PeerKey
from penstock.actors.errors import Fault, Refusal, bad
from penstock.actors.finding import Finder, Key, Then
from penstock.actors.library import Library, Title
from penstock.actors.messages import Find, Found, Leave, Manage, Managed
from penstock.actors.pins import Pins
from penstock.actors.preparing import Preparer, Version, Wanted, check_one_place
from penstock.actors.sources.fetch import Limits, Settings
from penstock.actors.sources.named import allowed_sources, check_name, check_source
from penstock.engine.kernels.cache import cache_folder
from penstock.engine.lora.recipe import Wish
from penstock.engine.params import InvalidParameter

FRESH_S = 30.0  # for so long what a source has is taken to be what it had


class AdaptersActor(Actor):
    """It holds nothing that cannot be had again: names are in a file of the engine's folder, what is ready on disk. A gateway asks again
    when this actor is replaced."""

    kind = "adapters"

    def start(self) -> dict[str, Any]:
        config = self.config
        self.settings = Settings(
            allowed=allowed_sources(config.adapter_sources), hub_endpoint=config.hub_endpoint, s3_endpoint=config.s3_endpoint
        )  # fmt: skip
        self.library = Library(config, Path(self.post.directory) / "adapters.json")
        self.folder = self._folder()
        self.facts: dict[str, Any] = {}  # what the executor's device has: see `Preparer`
        self.early: list[Find | Manage] = []  # that came before it was known what to prepare for
        self.found = self.orders = 0
        self.ordered: dict[str, int] = {}  # by name: the load under way that holds, if no later order comes
        self.finder = Finder(self._preparer)
        self.pins = self._open_pins()
        self.mail.watch(self.finder.bell)
        self.handlers |= {Find: self._find, Leave: self._leave, Manage: self._manage}
        return {}

    def _folder(self) -> Path:
        """Where what is ready lies. Raises `Refusal` if it is not where it was asked to be."""
        wanted = self.config.adapter_cache
        try:
            folder = Path(wanted) if wanted else cache_folder() / "adapters"
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return folder
        except OSError as error:
            if wanted:
                raise bad("adapter_cache", wanted, f"a folder that can be written to: {error.strerror}") from error
            self.log.warning("adapters are not kept from one start to the next", error=str(error))
            return Path(self.post.directory) / "ready"

    def _preparer(self) -> Preparer:
        limits = Limits(file_bytes=self.config.adapter_size, total=self.config.adapter_timeout)
        return Preparer(self.facts, self.folder, self.config.adapter_disk, limits)

    def _open_pins(self) -> Pins:
        def ask(name: str, title: Title) -> None:
            self._ask_for(name, title, lambda version, fault: None)

        return Pins(self.library, self.finder, self._key, ask, lambda message: self.mail.send(SCHEDULER, message))

    def finish(self) -> None:
        if hasattr(self, "finder"):
            self.finder.close()

    def met(self, before: dict[PeerKey, Peer]) -> None:
        executor, gateway = self.peers.get(EXECUTOR), self.peers.get(GATEWAY)
        if gateway is not None and gateway != before.get(GATEWAY):
            self.early = [one for one in self.early if isinstance(one, Manage) or one.job >> 32 == gateway.incarnation]
            self.finder.leave_all(gateway.incarnation)
        new = self.peers.get(SCHEDULER) != before.get(SCHEDULER)
        if not self.facts and executor is not None and executor.ready and executor.facts["adapters"]:
            self.facts = executor.facts["adapters"]
            early, self.early = self.early, []
            for message in early:
                self.handlers[type(message)](message)
            new = True  # there may be pins of another life
        if self.facts and new:
            self.pins.hand_over()

    def after(self) -> None:
        for source, fault in self.finder.collect():
            self.log.warning("adapter not ready", source=source, error=fault.message)

    # ── what requests ask for ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, message: Find) -> None:
        if not self.facts:
            self.early.append(message)
            return

        def answer(version: Version | None, fault: Fault | None) -> None:
            self.found += version is not None
            self.mail.send(GATEWAY, Found(message.job, version.place if version else (), fault.to_wire() if fault else None))

        try:
            wish = Wish.from_wire(message.wish)
            parts = [self._wanted(name, message.token) for name in wish.names]
            if message.token is not None:
                check_one_place(parts)
        except InvalidParameter as error:
            answer(None, Fault(code="invalid_request", message=str(error), field=error.field, value=error.value, limit=error.limit))
            return
        except Refusal as refusal:
            answer(None, refusal.fault)
            return
        # A private token is checked each time that it is used.
        part, fresh, title = parts[0], FRESH_S if message.token is None else 0.0, self.library.titles.get(wish.names[0])
        if (recipe := wish.recipe) is not None:
            titles = [self.library.titles.get(name) for name in wish.names]
            versions = [None if one is None else one.version for one in titles]
            texts = [text for part, version in zip(parts, versions, strict=True) for text in (*part.key, version or "")]
            key = (", ".join(part.source.shown for part in parts), repr(wish), *texts)
            known_parts = list(zip(parts, versions, strict=True))
            self.finder.ask(
                key, lambda preparer: preparer.merge(known_parts, recipe), answer, fresh, far=False, merged=True, who=message.job
            )
        elif title is None:
            known = self.finder.known(part.key)
            self.finder.ask(part.key, lambda preparer: preparer.prepare(part, known), answer, fresh, far=part.far, who=message.job)
        else:
            if message.digest in title.versions:  # a stream that had begun goes on with that
                title = replace(title, versions=(message.digest,))
            if message.token is None:
                self._ask_for(wish.names[0], title, answer, message.job)
            else:
                key, version = _key_of(title, part), title.version  # each token by itself
                known = self.finder.known(key)
                self.finder.ask(key, lambda preparer: preparer.again_for(part, version, known), answer, 0.0, far=part.far, who=message.job)

    def _leave(self, message: Leave) -> None:
        self.early = [one for one in self.early if not (isinstance(one, Find) and one.job == message.job)]
        self.finder.leave(message.job)

    def _wanted(self, name: str, token: str | None) -> Wanted:
        """What a name stands for: an adapter that is known by it, or a source, if those may be named. Raises `Refusal`."""
        title = self.library.titles.get(name)
        if title is not None:
            return self._of_title(replace(title, token=token or title.token))
        if not self.config.adapter_sources:
            raise _unknown(name, self.library)
        try:
            return Wanted(check_source(name), token, self.settings)
        except Refusal as refusal:
            raise _unknown(name, self.library) from refusal

    def _of_title(self, title: Title) -> Wanted:
        source = check_source(title.source)
        return Wanted(source, title.token, replace(self.settings, allowed=self.settings.allowed.plus(source)))

    def _key(self, title: Title) -> Key:
        """Of what was at it when it was given a name."""
        return _key_of(title, self._of_title(title))

    def _ask_for(self, name: str, title: Title, then: Then, who: int | None = None) -> None:
        """A name stands for what was loaded under it, or, if that was never done, for what its source has now."""
        part = self._of_title(title)
        key = _key_of(title, part)
        new = self.finder.known(key) is None

        def keep(version: Version | None, fault: Fault | None) -> None:
            if version is not None and title.version is None and self.library.titles.get(name) == title:
                self._name(name, title.again(version.digest, version.pages, title), version)
            then(version, fault)
            if new and version is not None and title.pinned:
                self.pins.send()

        self.finder.ask(key, lambda preparer: preparer.again(part, title.version), keep, None, far=part.far, who=who)

    def _name(self, name: str, title: Title, version: Version) -> None:
        self._put(name, title)
        self.finder.remember(self._key(title), version)

    def _put(self, name: str, title: Title | None) -> None:
        if title is None:
            self.library.remove(name)
        else:
            self.library.put(name, title)
        if self.library.unsaved:
            self.log.error("names of adapters are not saved", name=name, error=self.library.unsaved)

    # ── what operators order ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _manage(self, message: Manage) -> None:
        if not self.facts:
            self.early.append(message)
            return
        try:
            match message.order:
                case "load":
                    self._load(message)
                case "pin":
                    self._pin(message)
                case "list":
                    self._tell(message, None)
                case "unload" | "unpin":
                    title = self._title(message.name)
                    if message.order == "unload":
                        self.ordered.pop(message.name, None)
                        self._put(message.name, None)
                    else:
                        self._put(message.name, replace(title, pinned=False))
                    self.pins.send()
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
        if message.source is not None:
            title = Title(check_source(message.source).text, message.token)
        elif before is not None:
            title = Title(before.source, message.token or before.token)
        else:
            raise bad("source", None, f"given, since nothing is known by the name {message.name[:120]!r}")
        part = self._of_title(title)
        if all(other.source != title.source for other in self.library.titles.values()):
            part = replace(part, settings=self.settings)  # it must be allowed by itself
        self.orders += 1
        number = self.ordered[name] = self.orders
        known = self.finder.known(part.key)

        def then(version: Version | None, fault: Fault | None) -> None:
            now, holds = self.library.titles.get(name), self.ordered.get(name) == number
            if holds:
                del self.ordered[name]
            if version is not None and not holds:
                text = f"{name!r} was loaded or unloaded by a later order while this one was under way"
                fault = Fault(code="adapter_error", message=text, field="name", value=name)
            elif version is not None and now is not None and now.pinned:
                fault = self.pins.too_much(name, version, self.facts["pages"])
            if version is not None and fault is None:
                self._name(name, title.again(version.digest, version.pages, now), version)
                self.pins.send()
            self._tell(message, fault)

        # By a key of its own: what is under way may have seen what was there before.
        key = (*part.key, f"order {number}")
        self.finder.ask(key, lambda preparer: preparer.prepare(part, known), then, 0.0, far=part.far, once=True)

    def _pin(self, message: Manage) -> None:
        def then(version: Version | None, fault: Fault | None) -> None:
            title = self.library.titles.get(message.name)
            if version is not None and title is None:
                fault = _unknown(message.name, self.library).fault
            elif version is not None and title is not None:
                if title.version not in (None, version.digest):  # something else was loaded meanwhile
                    self._pin(message)
                    return
                fault = self.pins.too_much(message.name, version, self.facts["pages"])
                if fault is None:
                    self._put(message.name, replace(title, pinned=True))
                    self.pins.send()
            self._tell(message, fault)

        self._ask_for(message.name, self._title(message.name), then)

    def _tell(self, message: Manage, fault: Fault | None) -> None:
        rows = tuple([self._row(name, title) for name, title in self.library.titles.items()])
        self.mail.send(GATEWAY, Managed(message.job, rows, fault.to_wire() if fault is not None else None))

    def _row(self, name: str, title: Title) -> dict[str, Any]:
        part = self._of_title(title)
        key = _key_of(title, part)
        state, error = self.finder.state(key)
        row = {"name": name, "source": part.source.shown, "state": state, "pinned": title.pinned}
        if (version := self.finder.known(key)) is not None:
            row |= {"digest": version.digest, "rank": version.rank, "pages": version.pages}
        return row | ({"error": error} if error else {})

    def load(self) -> dict[str, Any]:
        return {"known": len(self.library.titles), "under_way": len(self.finder), "found": self.found, **self.finder.counts}


def _key_of(title: Title, part: Wanted) -> Key:
    """`part` is the title's source, with the token of whoever asks."""
    return (*part.key, title.version or "")


def _unknown(name: str, library: Library) -> Refusal:
    known = ", ".join(sorted(library.titles)[:20]) or "none"
    return Refusal("unknown_adapter", f"no adapter {name[:120]!r} is known", field="adapter", value=name[:120], limit=f"one of: {known}")
