"""The vocabulary: what each token id stands for.

A decoder of the `tokenizers` library turns a list of tokens into a text. Nearly all language models use one of three, in which every token
stands for bytes or text of its own, whatever is around it; knowing that, a stream of text costs one look-up a token:

- `BYTES`: byte-level BPE (GPT-2, Llama 3, Qwen, ...). A token is bytes; the text is their UTF-8.
- `RUNS`: SentencePiece with byte fallback (Llama 2, Mistral, Gemma, ...). A token is text with `▁` for a space, or one byte, `<0xE4>`.
- `WORDS`: Metaspace (T5 and older Unigram models). A token is text with `▁` for a space.
- `OTHER`: anything else (WordPiece, CTC, ...), of which only the library knows the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from functools import cached_property
from typing import Any

SPACE = "▁"  # how SentencePiece writes a space


class Kind(Enum):
    BYTES = "bytes"
    RUNS = "runs"
    WORDS = "words"
    OTHER = "other"


class Vocabulary:
    """The tokens of a `tokenizers.Tokenizer`, which is kept as `backend`."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        added: Mapping[int, Any] = backend.get_added_tokens_decoder()
        self.size: int = max(backend.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added), 0)
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.kind, self.drops_first_space, self._space = _classify(_parts(backend.decoder))
        self._byte_tokens: dict[int, int] = {}
        if self.kind is Kind.RUNS:
            names = [(byte, name) for byte in range(256) for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>")]
            self._byte_tokens = {token_id: byte for byte, name in names if (token_id := backend.token_to_id(name)) is not None}
        self._pieces: dict[int, bytes] = {}  # learnt as they are asked for; at most one entry for each id

    def first_text(self, token_id: int) -> str:
        """The text of the very first token (`WORDS`)."""
        return self._token(token_id).replace(self._space, "" if self.drops_first_space else " ")

    def byte(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token stands for (`RUNS`); `None` for any other."""
        return self._byte_tokens.get(token_id)

    def piece(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text, with a leading space where it has one; empty for an id that is no token."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._make_piece(token_id)
            if 0 <= token_id < self.size:
                self._pieces[token_id] = piece
        return piece

    def whole(self, token_id: int) -> str | None:
        """The token's text if that is the same wherever it stands but at the very beginning; `None` for parts of characters."""
        if self.kind is Kind.OTHER:
            return None
        try:
            return self.piece(token_id).decode()
        except UnicodeDecodeError:
            return None

    def _make_piece(self, token_id: int) -> bytes:
        token = self._token(token_id)
        match self.kind:
            case Kind.BYTES:
                return self._unmap(token)
            case Kind.RUNS if token_id in self._byte_tokens:
                return bytes([self._byte_tokens[token_id]])
            case Kind.RUNS | Kind.WORDS:
                return token.replace(self._space, " ").encode()
        text: str = self.backend.decode([token_id], skip_special_tokens=False) if token else ""
        return text.encode()

    def _token(self, token_id: int) -> str:
        token: str | None = self.backend.id_to_token(token_id) if 0 <= token_id < self.size else None
        return token or ""

    def _unmap(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # an added token that is written as it is
            return token.encode()

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Byte-level BPE writes each byte as a printable character: those that are printable as themselves, the others from U+0100 on."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        table = {chr(byte): byte for byte in printable}
        others = [byte for byte in range(256) if byte not in set(printable)]
        return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _parts(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder, as the maps that stand for them in tokenizer.json."""
    if decoder is None:
        return []
    parts = [json.loads(decoder.__getstate__())]
    while any(part["type"] == "Sequence" for part in parts):
        parts = [inner for part in parts for inner in (part["decoders"] if part["type"] == "Sequence" else [part])]
    return parts


def _classify(parts: list[dict[str, Any]]) -> tuple[Kind, bool, str]:
    """The kind, whether a space (`RUNS`) or the spaces (`WORDS`) of the first token are dropped, and the character for a space."""
    match parts:
        case [{"type": "ByteLevel"}]:
            return Kind.BYTES, False, ""
        case [{"type": "Metaspace", "replacement": space, "prepend_scheme": scheme}]:
            return Kind.WORDS, scheme != "never", space
        case [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]:
            match strip:
                case []:
                    return Kind.RUNS, False, SPACE
                case [{"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}]:
                    return Kind.RUNS, start == 1, SPACE
    return Kind.OTHER, False, ""
