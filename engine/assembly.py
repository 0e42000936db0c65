"""Assembly: from the tokens of one stream to whole characters, one token at a time, whatever the decoder.

`feed` returns the text that a token completes, and keeps the bytes of a character that is not complete. The pieces of a stream, joined,
are what `decode` returns for all its tokens at once (after the same context), with one exception that no stream can avoid: the library's
byte fallback makes *every* byte of an invalid run U+FFFD, also those of characters that were complete, and shown, before it broke.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from penstock.engine.vocabulary import Kind, Vocabulary

REPLACEMENT = "\ufffd"
CONTEXT = 16  # tokens of the prompt's end that are looked at: more than the bytes of a character, with room for tokens of no text
CONTINUATION = range(0x80, 0xC0)  # bytes of a character after its first
WINDOW = 8  # tokens without a whole character before `Window` gives up waiting for one


class Assembler(Protocol):
    """The decoder's state for one stream. `partial`: it waits for the rest of a character. `idle`: the next token's text depends on nothing
    before it."""

    partial: bool
    idle: bool

    def feed(self, token_id: int) -> str: ...
    def flush(self) -> str:
        """The text of an incomplete character when nothing more comes."""


class Utf8:
    """Byte-level tokens."""

    __slots__ = ("idle", "partial", "pending", "vocabulary")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.pending = vocabulary, b""
        self.partial, self.idle = False, True

    def feed(self, token_id: int) -> str:
        data = self.pending + self.vocabulary.piece(token_id)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self.pending = data[used:]
        self.partial = used < len(data)
        self.idle = not self.partial
        return text

    def flush(self) -> str:
        text, self.pending = self.pending.decode("utf-8", "replace"), b""
        self.partial, self.idle = False, True
        return text


class Runs:
    """Tokens of text, and runs of tokens of one byte each: an invalid run is U+FFFD for each byte from where that is known."""

    __slots__ = ("broken", "fresh", "idle", "partial", "pending", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, fresh: bool) -> None:
        self.vocabulary, self.fresh = vocabulary, fresh and vocabulary.drops_first_space
        self.pending, self.broken = b"", False
        self.partial, self.idle = False, not self.fresh

    def feed(self, token_id: int) -> str:
        byte = self.vocabulary.byte(token_id)
        if byte is None:
            text = self._give_up() + self.vocabulary.piece(token_id).decode()
            self.broken = False
        elif self.broken:
            text = REPLACEMENT
        else:
            run = self.pending + bytes([byte])
            try:
                text, used = codecs.utf_8_decode(run, "strict", False)
                self.pending = run[used:]
            except UnicodeDecodeError:
                text, self.pending, self.broken = REPLACEMENT * len(run), b"", True
        return self._settle(text)

    def flush(self) -> str:
        return self._settle(self._give_up())

    def _give_up(self) -> str:
        text, self.pending = REPLACEMENT * len(self.pending), b""
        return text

    def _settle(self, text: str) -> str:
        if self.fresh and text:
            text, self.fresh = text.removeprefix(" "), False
        self.partial = bool(self.pending)
        self.idle = not (self.partial or self.broken or self.fresh)
        return text


class Words:
    """Tokens of text only."""

    __slots__ = ("idle", "partial", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, fresh: bool) -> None:
        self.vocabulary, self.partial, self.idle = vocabulary, False, not fresh

    def feed(self, token_id: int) -> str:
        text = self.vocabulary.piece(token_id).decode() if self.idle else self.vocabulary.first_text(token_id)
        self.idle = True
        return text

    def flush(self) -> str:
        return ""


class Window:
    """Any other decoder: a token's text is what it adds to the text of the few tokens before it."""

    __slots__ = ("idle", "ids", "partial", "shown", "vocabulary", "waiting")

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int]) -> None:
        self.vocabulary = vocabulary
        self.ids = list(context)
        self.shown = self._decode()
        self.waiting = 0  # ids at the end that are not shown
        self.partial, self.idle = False, False  # a token's text always depends on those before it

    def feed(self, token_id: int) -> str:
        self.ids.append(token_id)
        self.waiting += 1
        text = self._decode()
        self.partial = text.endswith(REPLACEMENT) and self.waiting < WINDOW
        return "" if self.partial else self._take(text)

    def flush(self) -> str:
        self.partial = False
        return self._take(self._decode()) if self.waiting else ""

    def _take(self, text: str) -> str:
        new = text[len(self.shown) :]
        if new or len(self.ids) > 2 * WINDOW:  # tokens of no text stay with the one before them, which they do not separate from the next
            self.ids = self.ids[-self.waiting if new else -WINDOW :]
            text = self._decode()
        self.shown, self.waiting = text, 0
        return new

    def _decode(self) -> str:
        text: str = self.vocabulary.backend.decode(self.ids, skip_special_tokens=False) if self.ids else ""
        return text


def assembler(vocabulary: Vocabulary, prompt: Sequence[int], skipped: frozenset[int]) -> Assembler:
    """A decoder's state right after `prompt`, from its last tokens only: a character that the prompt leaves incomplete is
    continued, and the first token keeps its leading space if any text is before it."""
    tail: list[int] = []
    for token_id in reversed(prompt):
        if token_id in skipped or not 0 <= token_id < vocabulary.size:
            continue
        tail.append(token_id)
        if len(tail) == CONTEXT or (vocabulary.whole(token_id) and vocabulary.byte(token_id) is None):
            break
    tail.reverse()
    fresh = not tail
    match vocabulary.kind:
        case Kind.OTHER:
            return Window(vocabulary, tail)
        case Kind.WORDS:
            return Words(vocabulary, fresh)
        case Kind.BYTES:
            state: Assembler = Utf8(vocabulary)
        case Kind.RUNS:
            state = Runs(vocabulary, fresh)
    begun = len(tail) < CONTEXT
    for token_id in tail:
        # A cut may have been within a character: bytes that continue it would make `Runs` take the whole run for broken.
        begun = begun or vocabulary.byte(token_id) not in CONTINUATION
        if begun:
            state.feed(token_id)
    return state
