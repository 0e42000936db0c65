"""Typed errors as they travel: one value, one table of codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

LONGEST_SHOWN = 120  # characters of a value that is refused

# code → (whether trying again helps, what it means)
CODES: dict[str, tuple[bool, str]] = {
    "invalid_request": (False, "a field is missing, unknown, of the wrong type or out of range"),
    "prompt_too_long": (False, "the prompt does not fit the model's context, or can never fit the KV cache"),
    "duplicate_request": (False, "the client has an open request of this id"),
    "unknown_adapter": (False, "no adapter of this name is configured"),
    "adapter_error": (False, "the adapter cannot be had from its source, is broken, not supported, or made for another model"),
    "template_error": (False, "the chat template is missing or raised"),
    "digest_mismatch": (False, "the request was begun on another model, tokenizer or adapter"),
    "not_found": (False, "there is no such request"),
    "overloaded": (True, "a limit is reached: try again after `retry_after` seconds"),
    "deadline": (True, "the request's deadline came before it was accepted"),
    "queue_timeout": (True, "the request's queue timeout came before it was accepted"),
    "unavailable": (True, "the engine is not ready, or lost a part and is recovering it"),
    "draining": (True, "the engine finishes what is open and takes nothing new: use another one"),
    "unauthorized": (False, "only an operator of the engine may order this"),
    "lease_expired": (True, "the client was silent for longer than its lease"),
    "out_of_memory": (True, "a step did not fit the device's memory: the engine goes on with smaller ones"),
    "engine_fault": (False, "the engine failed on this request"),
    "version": (False, "the peer speaks another version of the protocol"),
    "malformed": (False, "the bytes are not a message"),
    "unknown_message": (False, "no message has this tag"),
    "too_large": (False, "the message has too many bytes"),
    "too_many_elements": (False, "the message has too many elements"),
    "too_deep": (False, "the message is nested too deeply"),
    "model_error": (False, "the model's files are missing, broken or not supported"),
    "start_error": (False, "the engine could not start"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What went wrong, with which field and value, what the limit is, whether a retry helps (and after how many seconds)."""

    code: str
    message: str
    field: str | None = None
    value: str | None = None
    limit: str | None = None
    retryable: bool | None = None  # None: as the table says
    retry_after: float | None = None
    actor: str | None = None

    def to_wire(self) -> dict[str, Any]:
        values = {spec.name: value for spec in fields(self) if (value := getattr(self, spec.name)) is not None}
        return {"retryable": CODES.get(self.code, (False, ""))[0], **values}

    @classmethod
    def from_wire(cls, values: Mapping[str, Any]) -> Self:
        known = {spec.name for spec in fields(cls)}
        return cls(**{"code": "engine_fault", "message": "", **{name: value for name, value in values.items() if name in known}})


class Refusal(Exception):
    """Raised where a request is judged; carries the `Fault` that its client gets."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        self.fault = Fault(code=code, message=message, **more)
        super().__init__(message)

    @classmethod
    def of(cls, fault: Fault) -> Self:
        """What another actor judged."""
        refusal = cls(fault.code, fault.message)
        refusal.fault = fault
        return refusal


def too_many_pages(pages: int, most: int, total: int) -> Refusal:
    """An adapter that can never be on the device."""
    text = f"the adapter takes {pages} pages of 16 ranks, and there are {total}, half of which may be pinned"
    return Refusal("adapter_error", text, field="adapter", value=str(pages), limit=f"{most} pages")


def bad(field: str, value: object, limit: str) -> Refusal:
    """A field whose value is not as it must be. Of what others send, only so much is shown as fits a line."""
    text, shown = (value[:LONGEST_SHOWN], repr(value[:LONGEST_SHOWN])) if isinstance(value, str) else (repr(value)[:LONGEST_SHOWN],) * 2
    return Refusal("invalid_request", f"{field}={shown}: must be {limit}", field=field, value=text, limit=limit)
