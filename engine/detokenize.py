"""Detokenizing: the tokens of many streams to text, as they come.

Ids and text are released together, whole tokens only, so that one offset describes both: the text released with the first n generated ids
is the text of exactly those. A token waits while its last character is incomplete, or while its text may be part of a stop string.

**The text of a stream** is `decode(prompt + generated)` after `decode(prompt)`: the space that SentencePiece-like decoders drop at the
beginning of a text is dropped only if the prompt shows no text, and a character that the prompt leaves incomplete is continued.

**Stop strings.** The text ends before the stop string that *begins* first; of several that begin there the shortest, since it is
complete first, is the one reported. So where a text ends does not depend on how it is cut into tokens. Released with it are the ids up
to the token that completed the stop string.

**Costs.** A token whose text is its own (nearly all) is one look-up. Held back are at most the longest stop string and one token of
text, with their ids; a run of tokens that all end within a character is released after `OPEN_TOKENS`, its incomplete character
following later. Nothing is decoded twice, so no stream is quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from penstock.engine.assembly import Assembler, assembler
from penstock.engine.stops import ROOT, StopStrings
from penstock.engine.tokenfiles import TokenizeError, load_backend, tokenizer_digest, tokenizer_folder
from penstock.engine.vocabulary import Vocabulary

OPEN_TOKENS = 8  # a character has at most four bytes: more tokens than that only wait if each begins another one
SHARED_STOPS = 64  # sets of stop strings whose automata are kept


class TextStream:
    """One stream's decoder, made by `Detokenizer.open`.

    `push` returns the text that may be shown now, with the ids that go with it in `ids`; `matched` is the stop string that ended the
    stream, after which nothing more is released.
    """

    __slots__ = (
        "_assembler", "_base", "_end", "_first", "_groups", "_held", "_known", "_match", "_node", "_open", "_plain", "_stops", "_text",
        "ids", "matched",
    )  # fmt: skip

    def __init__(self, known: _Texts, state: Assembler, stops: StopStrings | None, generated: Sequence[int] = ()) -> None:
        self.ids: Sequence[int] | None = None  # what the last `push` released; None: just the one id that was pushed
        self.matched: str | None = None
        self._known, self._assembler, self._stops = known, state, stops
        self._first = stops.first if stops else None
        self._held: list[int] = []  # ids that wait
        self._text = ""  # the whole characters of them
        self._base = 0  # position in the stream's text where `_text` begins; positions are only compared while something waits
        self._end = 0  # position where it ends
        self._groups: list[list[int]] = []  # of waiting ids: [how many, position where their text ends]; a group goes as one
        self._open = 0  # ids since the last group, which end within a character
        self._node = ROOT
        # A complete stop string: where it begins, waiting ids up to it. One that begins earlier may still complete.
        self._match: tuple[int, int, str] | None = None
        self._plain = state.idle  # nothing waits, nothing is known of what comes
        for token_id in generated:
            self.push(token_id)
        self._settle()

    def push(self, token_id: int) -> str | None:
        """Take the next token; returns the text released with `ids`, or `None` if nothing is (an empty text still releases ids)."""
        if self._plain:
            text = self._known.get(token_id)
            if text is not None and (self._first is None or self._first.isdisjoint(text)):
                return text
        return self._push(token_id)

    def finish(self, closing: int | None = None) -> str:
        """No token follows: returns the text of all that waits, released with `ids`. `closing` is a token that ends the text without
        being part of it, such as an end-of-sequence or stop token: its id is released, its text is not."""
        if self.matched is not None:
            self.ids = ()
            return ""
        text = self._assembler.flush()
        self._text += text
        if self._stops is not None and text:
            self._watch(self._stops, text)
        self._end = self._base + len(self._text)
        if self._match is not None:
            return self._cut(self._match)
        self.ids, text = (*self._held, *(() if closing is None else (closing,))), self._text
        self._held, self._text, self._groups, self._open, self._plain = [], "", [], 0, False
        return text

    def _push(self, token_id: int) -> str | None:
        """`push` where something waits, or may have to."""
        self.ids, self._plain = None, False
        if self.matched is not None:
            return None
        state, stops, held = self._assembler, self._stops, self._held
        text = self._known.add(token_id, state)
        held.append(token_id)
        self._text = whole = self._text + text
        if stops is not None:
            if text:
                self._watch(stops, text)
            self._end += len(text)
        self._open += 1
        waits = state.partial and self._open < OPEN_TOKENS
        if stops is None or (self._node == ROOT and self._match is None and not waits):
            return None if waits else self._release_all(whole)
        if not waits:
            if self._groups and self._groups[-1][1] == self._end:
                self._groups[-1][0] += self._open
            else:
                self._groups.append([self._open, self._end])
            self._open = 0
        safe = self._end - stops.depths[self._node]
        if self._match is not None and safe >= self._match[0]:
            return self._cut(self._match)
        return self._release(safe)

    def _watch(self, stops: StopStrings, text: str) -> None:
        """Advance over new text, up to the end or to a stop string that no other can precede."""
        node, position, match = self._node, self._end, self._match
        for character in text:
            position += 1
            node = stops.step(node, character)
            if node == ROOT and match is None:
                continue
            string = stops.ends[node]
            if string and (match is None or position - len(string) < match[0]):
                match = (position - len(string), len(self._held), string)
            if match is not None and position - stops.depths[node] >= match[0]:
                node = ROOT
                break
        self._node, self._match = node, match

    def _release_all(self, text: str) -> str:
        held = self._held
        self._text, self._base, self._open = "", self._end, 0
        if len(held) == 1:
            held.clear()
            self._plain = self._assembler.idle
        else:
            self.ids, self._held = held, []
            self._groups.clear()
        return text

    def _release(self, safe: int) -> str | None:
        """Release the groups whose text ends at `safe` or before."""
        count, done = 0, 0
        for size, end in self._groups:
            if end > safe:
                break
            count, done, cut = count + size, done + 1, end
        if not count:
            return None
        del self._groups[:done]
        text, self._text = self._text[: cut - self._base], self._text[cut - self._base :]
        self.ids, self._base = self._held[:count], cut
        del self._held[:count]
        if self._match is not None:
            self._match = (self._match[0], self._match[1] - count, self._match[2])
        return text

    def _cut(self, match: tuple[int, int, str]) -> str:
        """End the stream before a stop string, with the ids up to the token that completed it."""
        begin, count, self.matched = match
        text, self.ids = self._text[: max(begin - self._base, 0)], self._held[: max(count, 0)]
        self._held, self._text, self._groups, self._open = [], "", [], 0
        return text

    def _settle(self) -> None:
        """What was pushed so far was released, with its text, before this stream was opened."""
        if self._match is not None:
            self._match = (self._match[0], self._match[1] - len(self._held), self._match[2])
        self._held, self._text, self._groups, self._open, self._base, self.ids = [], "", [], 0, self._end, None
        self._plain = self.matched is None and self._node == ROOT and self._assembler.idle


class _Texts(dict[int, str]):
    """Token id → its text, for tokens whose text is their own, learnt as they come; at most one entry for each id of the vocabulary."""

    __slots__ = ("parts", "skipped", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        super().__init__((token_id, "") for token_id in skipped)
        self.vocabulary, self.skipped = vocabulary, skipped
        self.parts: set[int] = set()  # tokens that are known to have no text of their own

    def add(self, token_id: int, state: Assembler) -> str:
        """The text that the token completes in `state`. Skipped tokens and ids that are no token do not reach the decoder."""
        text = self.get(token_id)
        if text is None and token_id not in self.parts:
            if not 0 <= token_id < self.vocabulary.size:
                return ""
            text = self.vocabulary.whole(token_id)
            if text is None:
                self.parts.add(token_id)
            else:
                self[token_id] = text
        if text is not None and (state.idle or token_id in self.skipped):
            return text
        return state.feed(token_id)


class Detokenizer:
    """The decoding half of a tokenizer; loading it needs no transformers unless the model has no tokenizer.json."""

    def __init__(self, backend: Any, digest: str = "") -> None:
        self.vocabulary, self.digest = Vocabulary(backend), digest
        none: frozenset[int] = frozenset()
        self._all, self._plain = _Texts(self.vocabulary, none), _Texts(self.vocabulary, self.vocabulary.special)
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._shown: dict[int, str] = {}

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """From a folder or a hub id. Raises `TokenizeError` (`model_error`) if the files are missing or broken."""
        folder = tokenizer_folder(source)
        return cls(load_backend(folder), tokenizer_digest(folder))

    def open(
        self, prompt: Sequence[int], generated: Sequence[int] = (), *, stop: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> TextStream:
        """A decoder for what follows `prompt` and `generated` (ids, which were released before, with their text: the stream continues
        after them as if it had pushed them itself)."""
        known = self._plain if skip_special_tokens else self._all
        state = assembler(self.vocabulary, _plain_ints(prompt), known.skipped)
        return TextStream(known, state, self._automaton(tuple(stop)), _plain_ints(generated))

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """A prompt's text, for an echo: what a stream opened after it goes on from. An incomplete last character is left to the stream."""
        known = self._plain if skip_special_tokens else self._all
        state = assembler(self.vocabulary, (), known.skipped)
        return "".join([known.add(token_id, state) for token_id in _plain_ints(ids)])

    def token_text(self, token_id: int) -> str:
        """How to show one token, special tokens included; U+FFFD for parts of characters."""
        text = self._shown.get(token_id)
        if text is None:
            text = self.token_bytes(token_id).decode("utf-8", "replace")
            if 0 <= token_id < self.vocabulary.size:  # else no bound
                self._shown[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; empty for an id that is no token."""
        return self.vocabulary.piece(token_id)

    def _automaton(self, stop: tuple[str, ...]) -> StopStrings | None:
        if not stop:
            return None
        if stop not in self._stops:
            if len(self._stops) >= SHARED_STOPS:
                self._stops.pop(next(iter(self._stops)))
            self._stops[stop] = StopStrings(stop)
        return self._stops[stop]


class NullStream:
    """The stream of an engine without a tokenizer: every id at once, and no text."""

    __slots__ = ("ids", "matched")

    def __init__(self) -> None:
        self.ids: Sequence[int] | None = None
        self.matched: str | None = None

    def push(self, token_id: int) -> str | None:
        return ""

    def finish(self, closing: int | None = None) -> str:
        self.ids = () if closing is None else (closing,)
        return ""


class NullDetokenizer:
    """Stands in for `Detokenizer` where only token ids are served."""

    digest = ""

    def open(
        self, prompt: Sequence[int], generated: Sequence[int] = (), *, stop: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> NullStream:
        """Raises `TokenizeError` (`invalid_request`) for stop strings, which could never match."""
        if stop:
            raise TokenizeError("invalid_request", "stop strings need a tokenizer, and this engine has none: use stop_token_ids", "stop")
        return NullStream()

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return b""


def _plain_ints(ids: Sequence[int]) -> Sequence[int]:
    """Python's own integers: NumPy's are slow to look up, and the tokenizers library does not take them."""
    convert = getattr(ids, "tolist", None)
    return convert() if convert is not None else ids
