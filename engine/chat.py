"""Chats: messages checked, and rendered to one text by the model's template.

A template is a program that came with the model. The sandbox that transformers runs it in bounds what it may touch, not how long it runs
or how much it writes; here a count of its lines and characters does, so that a bad template costs one request and not the tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from penstock.engine.params import PromptOptions
from penstock.engine.tokenfiles import TokenizeError

TEMPLATE_LINES = 1_000_000  # that may run for one chat, in about half a second; real templates run some dozen lines a message
TEMPLATE_CHARACTERS = 64_000_000
TEMPLATE_FILE = "<template>"  # the file name that Jinja gives to code compiled from a string
# What `template_kwargs` must not set: arguments of apply_chat_template and of the renderer beneath it.
RESERVED = frozenset(
    {
        "add_generation_prompt", "chat", "chat_template", "compiled_template", "continue_final_message", "conversation", "conversations",
        "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
        "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip

Message = dict[str, Any]


def check_messages(messages: object) -> list[Message]:
    """The messages of a chat as templates take them: maps with a text `role` and a text `content`, whatever else they hold. A content that
    is a list of `{"type": "text", "text": ...}` becomes the texts, joined. Raises `TokenizeError` (`invalid_request`)."""
    if not isinstance(messages, list | tuple) or not messages:
        raise _wrong("messages", messages, "a non-empty list of messages")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def render(tokenizer: Any, messages: Sequence[Message], options: PromptOptions) -> str:
    """The text of a chat, by the template of a transformers tokenizer. Raises `TokenizeError`: `template_error` if there is no template,
    or it raises, runs away or writes nothing; `invalid_request` for template kwargs that it must not set."""
    kwargs = _template_kwargs(options.template_kwargs or {})
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizeError("template_error", "this model has no chat template: send a prompt", "messages")
    budget, before = _Budget(), sys.gettrace()
    sys.settrace(budget.call)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            **kwargs,
        )
    except Exception as error:  # a template may raise anything
        reason = str(error) or type(error).__name__
        raise TokenizeError("template_error", f"the chat template failed: {reason[:500]}", "messages") from error
    finally:
        sys.settrace(before)
    if not isinstance(text, str) or not text.strip():
        raise TokenizeError("template_error", "the chat template wrote nothing", "messages")
    return text


class _RunsAway(Exception):
    """A template passed its budget."""


class _Budget:
    """Counts the lines that a template runs and the characters that it yields, as the interpreter's trace function of this thread."""

    def __init__(self) -> None:
        self.lines = self.characters = 0

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.line if frame.f_code.co_filename == TEMPLATE_FILE else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.lines += 1
        if event == "return" and isinstance(arg, str):  # also what a generator yields
            self.characters += len(arg)
        if self.lines > TEMPLATE_LINES:
            raise _RunsAway(f"it ran more than {TEMPLATE_LINES} lines")
        if self.characters > TEMPLATE_CHARACTERS:
            raise _RunsAway(f"it wrote more than {TEMPLATE_CHARACTERS} characters")
        return self.line


def _message(where: str, message: object) -> Message:
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise _wrong(where, message, "a map with a role and a content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _wrong(f"{where}.role", role, "a non-empty text")
    if isinstance(content, list | tuple):
        content = "".join([_part(f"{where}.content[{index}]", part) for index, part in enumerate(content)])
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", content, 'a text, or a list of {"type": "text", "text": ...}')
    return {**message, "content": content}


def _part(where: str, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _wrong(where, part, 'of the form {"type": "text", "text": ...}')
    return text


def _template_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in kwargs.items():
        if name in RESERVED:
            raise _wrong("template_kwargs", name, "names that are free; this one belongs to the engine")
        if name in ("tools", "documents") and value is not None and not _maps(value):
            raise _wrong(f"template_kwargs.{name}", value, "a list of maps")
    return dict(kwargs)


def _maps(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _wrong(where: str, value: object, limit: str) -> TokenizeError:
    shown = repr(value)
    return TokenizeError("invalid_request", f"{where}={shown if len(shown) <= 120 else shown[:117] + '...'}: must be {limit}", where)
