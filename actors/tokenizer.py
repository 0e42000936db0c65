"""The tokenizer actor: a stateless call, text in, ids out. All encoding is engine.tokenize's."""

from __future__ import annotations

from typing import Any

from penstock.actors.actor import GATEWAY, Actor
from penstock.actors.config import EngineConfig
from penstock.actors.errors import Fault, Refusal
from penstock.actors.messages import Encode, Encoded
from penstock.engine.open import model_folder
from penstock.engine.params import PromptOptions
from penstock.engine.tokenize import NullTokenizer, TokenizeError, Tokenizer


def tokenizer_source(config: EngineConfig) -> str | None:
    """Where the tokenizer's files are; None if only token ids are served."""
    return None if config.tokenizer == "none" else config.tokenizer or model_folder(config.model)


class TokenizerActor(Actor):
    kind = "tokenizer"

    def start(self) -> dict[str, Any]:
        source = tokenizer_source(self.config)
        try:
            self.tokenizer = NullTokenizer(0) if source is None else Tokenizer.load(source)
        except TokenizeError as error:
            raise Refusal(error.code, str(error), field="tokenizer", value=source, actor=self.kind) from error
        self.handlers[Encode] = self._encode
        self.awaits[Encode] = lambda encode: ((GATEWAY, encode.job >> 32),)
        return {"digest": self.tokenizer.digest, "chat": self.tokenizer.has_chat_template}

    def _encode(self, message: Encode) -> None:
        try:
            options = PromptOptions.from_wire(message.options)
            ids = b""
            if message.messages is not None:
                ids = self.tokenizer.chat(message.messages, options).tobytes()
            elif message.prompt is not None:
                ids = self.tokenizer.encode(message.prompt, options).tobytes()
            encoded = Encoded(message.job, ids, tuple(self.tokenizer.words(word) for word in message.words), None)
        except TokenizeError as error:
            fault = Fault(code=error.code, message=error.message, field=error.field, actor=self.kind)
            encoded = Encoded(message.job, b"", (), fault.to_wire())
        self.mail.send(GATEWAY, encoded)
