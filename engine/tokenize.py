"""Tokenizing: texts, chats and bad words to token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from penstock.engine.chat import check_messages, render
from penstock.engine.params import PromptOptions
from penstock.engine.request import BadWords, Tokens
from penstock.engine.tokenfiles import TokenizeError, load_fast, tokenizer_digest, tokenizer_folder

__all__ = ["NullTokenizer", "TokenizeError", "Tokenizer"]

ANCHOR = "\n"  # text after it is not at the beginning, and not part of a longer word


class Tokenizer:
    """A model's tokenizer and chat template; made by `load`, or from a transformers tokenizer that has a `backend_tokenizer`.

    `vocab_size` is one more than the largest id. `special` maps `bos`, `eos`, `unk`, `pad` to ids, those that the model has.
    """

    def __init__(self, tokenizer: Any, digest: str = "") -> None:
        self._tokenizer, self._backend, self.digest = tokenizer, tokenizer.backend_tokenizer, digest
        self._backend.no_truncation()
        self._backend.no_padding()
        added: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        self.vocab_size: int = max(self._backend.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added), 0)
        names = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
        self.special: dict[str, int] = {name: token_id for name, token_id in names.items() if token_id is not None}

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """From a folder or a hub id; no code of the model's is run. Raises `TokenizeError` (`model_error`)."""
        folder = tokenizer_folder(source)
        return cls(load_fast(folder), tokenizer_digest(folder))

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, prompt: str, options: PromptOptions) -> Tokens:
        """The ids of a text, int32, the last `options.truncate` of them. Raises `TokenizeError` (`invalid_request`) for what is not valid
        Unicode or gives no ids."""
        return self._finish(self._encode(prompt, "prompt", special=options.add_special_tokens), options, "prompt")

    def chat(self, messages: object, options: PromptOptions) -> Tokens:
        """The ids of a chat, int32, by the model's template, which writes the special tokens itself. Raises `TokenizeError`."""
        text = render(self._tokenizer, check_messages(messages), options)
        return self._finish(self._encode(text, "messages", special=False), options, "messages")

    def words(self, text: str) -> BadWords:
        """The ways in which a word may be generated: after a space, at the beginning and in the middle of a text; without repeats. None
        for a word that the vocabulary cannot write, which cannot be generated either."""
        bare = text.lstrip(" ") or text
        anchor, after = self._encode(ANCHOR, "bad_words"), self._encode(ANCHOR + bare, "bad_words")
        found = [self._encode(variant, "bad_words") for variant in (text, bare, " " + bare)]
        if after[: len(anchor)] == anchor:  # SentencePiece puts a space before the first word only
            found.append(after[len(anchor) :])
        unknown = self.special.get("unk", -1)
        return tuple(dict.fromkeys(tuple(ids) for ids in found if ids and unknown not in ids))

    def _encode(self, text: str, field: str, *, special: bool = False) -> list[int]:
        """`encode_batch_fast` keeps no offsets: a third of the time and memory of `encode` on long texts."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizeError("invalid_request", f"{field}: half a surrogate pair at character {error.start}", field) from error
        try:
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        except Exception as error:  # the library raises bare Exception
            raise TokenizeError("invalid_request", f"{field}: the tokenizer cannot encode it: {error}", field) from error
        except BaseException as error:
            # A panic of the Rust code is not even an Exception. It must not end the process: the gateway would send the same text again.
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizeError("invalid_request", f"{field}: the tokenizer failed on it: {error}", field) from error
        return ids

    def _finish(self, ids: list[int], options: PromptOptions, field: str) -> Tokens:
        if not ids:
            raise TokenizeError("invalid_request", f"{field}: it has no tokens, and at least one is needed", field)
        return np.array(ids if options.truncate is None else ids[-options.truncate :], dtype=np.int32)


class NullTokenizer:
    """Stands in for `Tokenizer` where only token ids are served: every text is an `invalid_request`."""

    digest = ""
    has_chat_template = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.special = vocab_size, dict[str, int]()

    def encode(self, prompt: str, options: PromptOptions) -> Tokens:
        self._refuse("prompt")

    def chat(self, messages: object, options: PromptOptions) -> Tokens:
        self._refuse("messages")

    def words(self, text: str) -> BadWords:
        self._refuse("bad_words")

    def _refuse(self, field: str) -> NoReturn:
        raise TokenizeError("invalid_request", f"{field}: this engine has no tokenizer: send token ids", field)
