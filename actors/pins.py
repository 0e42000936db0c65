"""Which adapters are to stay on the device: how much of it they may take, and telling the scheduler."""

from __future__ import annotations

from collections.abc import Callable

from penstock.actors.errors import Fault
from penstock.actors.finding import Finder, Key
from penstock.actors.library import Library, Title
from penstock.actors.messages import Pin
from penstock.actors.preparing import Version
from penstock.engine.lora.residency import most_pinned


class Pins:
    """The library says which. `key` is that of a title at the finder, `ask` has it made ready, `send` is to the scheduler."""

    def __init__(
        self, library: Library, finder: Finder, key: Callable[[Title], Key], ask: Callable[[str, Title], None],
        send: Callable[[Pin], object],
    ) -> None:  # fmt: skip
        self._library, self._finder, self._key, self._ask, self._send = library, finder, key, ask, send
        self._asked: set[Key] = set()  # since the last change of hands: one that cannot be had is not asked for again and again

    def too_much(self, name: str, version: Version, pages: int) -> Fault | None:
        """If this, pinned under this name, left too little room for others in so many pages."""
        places, others = self._places(), {}
        for other, title in self._pinned().items():
            digest, taken = (places[other][0].hex(), places[other][1]) if other in places else (title.version or other, title.pages)
            if other != name and digest != version.digest:
                others[digest] = taken
        most = most_pinned(pages)
        if sum(others.values()) + version.pages <= most:
            return None
        text = f"{sum(others.values())} pages are pinned, and {name!r} takes {version.pages}: others must fit beside them"
        return Fault(code="invalid_request", message=text, field="adapter", limit=f"{most} pages")

    def hand_over(self) -> None:
        """The scheduler is another one, or whoever sends to it is: what is not known is asked for, once."""
        self._asked.clear()
        self.send()

    def send(self) -> None:
        """What is known, at once; to be called again when more is. What is not known yet stays on the device if it is there."""
        pinned, places = self._pinned(), self._places()
        self._asked &= {self._key(title) for name, title in pinned.items() if name not in places}
        for name, title in pinned.items():
            if name not in places and (key := self._key(title)) not in self._asked:
                self._asked.add(key)
                self._ask(name, title)
        known = {digest for digest, _, _ in places.values()}
        kept = [bytes.fromhex(title.version) for name, title in pinned.items() if name not in places and title.version is not None]
        self._send(Pin(tuple(dict.fromkeys(places.values())), tuple([digest for digest in dict.fromkeys(kept) if digest not in known])))

    def _pinned(self) -> dict[str, Title]:
        return {name: title for name, title in self._library.titles.items() if title.pinned}

    def _places(self) -> dict[str, tuple[bytes, int, str]]:
        """By name, as far as they are known."""
        versions = {name: self._finder.known(self._key(title)) for name, title in self._pinned().items()}
        return {name: version.place for name, version in versions.items() if version is not None}
