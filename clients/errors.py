"""Everything that can go wrong, as one tree.

    PenstockError                what an engine or the SDK refuses, fails at or loses; never raised for a bug in the caller's loop
    ├── InvalidRequest           a field is missing, unknown, of the wrong type or out of range: correct it, do not retry
    │   ├── PromptTooLong        the prompt does not fit the context, or can never fit the KV cache
    │   ├── DuplicateRequest     the client has an open request of this id
    │   ├── UnknownAdapter       no adapter of this name is configured
    │   ├── AdapterError         the adapter cannot be had from its source, is broken, not supported, or made for another model
    │   ├── TemplateError        the chat template is missing, or raised on these messages
    │   ├── DigestMismatch       a saved request was begun on another model, tokenizer or adapter
    │   ├── MessageTooLarge      the message has too many bytes or elements, or is nested too deeply
    │   └── NotFound             there is no such request
    ├── Retryable                the request was fine; the same request may succeed later
    │   ├── Overloaded           a limit of the engine is reached: try again after `retry_after` seconds
    │   ├── Unavailable          the engine is not ready, or lost a part and is recovering it
    │   ├── Draining             the engine finishes what is open and takes nothing new: use another one
    │   ├── LeaseExpired         the client was silent for longer than its lease
    │   └── ConnectionLost       no engine answers at the address (any more); what was received is kept and can be resumed
    ├── EngineFault              the engine failed on this request; `actor` names the part
    ├── ProtocolError            the peer sent what is no message, or took ours for none
    │   └── VersionMismatch      the peer speaks another version of the protocol
    ├── Unauthorized             the engine does not know this client's key (any more), or its user may not order that
    ├── StartError               an engine could not start
    │   └── ModelError           because the model's files are missing, broken or not supported
    ├── ClientClosed             the client was closed while it was used, or is used outside its event loop
    └── OutputError              a file of results cannot be written, or does not belong to its input

Each has `code` (stable, for programs), `message` (for people), and where they apply `field`, `value` and `limit` (what was wrong, with
which value, and what is allowed), `retry_after` (seconds), `actor` (who failed) and `request` (the id of the request).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from penstock.engine.params import InvalidParameter


class PenstockError(Exception):
    """The root of the tree, and the error for a code that this client does not know."""

    default_code: ClassVar[str] = "error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        field: str | None = None,
        value: str | None = None,
        limit: str | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        actor: str | None = None,
        request: str | None = None,
    ) -> None:
        self.code = code or self.default_code
        self.message = message or self.code
        self.field, self.value, self.limit = field, value, limit
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after, self.actor, self.request = retry_after, actor, request
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keeps the attributes when a process pool carries the error over."""
        return type(self), (self.message,), dict(self.__dict__)

    def again(self) -> PenstockError:
        """An equal error to raise elsewhere: one object raised in many tasks would collect the tracebacks of all."""
        values = self.to_map()
        return type(self)(values.pop("message"), **values)

    def to_map(self) -> dict[str, Any]:
        """The error as a plain map, for logs and JSON lines: only what is set."""
        names = ("code", "message", "field", "value", "limit", "retryable", "retry_after", "actor", "request")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class InvalidRequest(PenstockError):
    """A field is missing, unknown, of the wrong type or out of range: `field`, `value` and `limit` say which."""

    default_code = "invalid_request"


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the model's context, or can never fit the KV cache. `truncate=…` keeps its end instead."""

    default_code = "prompt_too_long"


class DuplicateRequest(InvalidRequest):
    """The client has an open request of this id."""

    default_code = "duplicate_request"


class UnknownAdapter(InvalidRequest):
    """No adapter of this name is configured."""

    default_code = "unknown_adapter"


class AdapterError(InvalidRequest):
    """The adapter cannot be had from its source, is broken, not supported, or made for another model: `limit` says which. Where trying
    again may help, `retryable` is set."""

    default_code = "adapter_error"


class TemplateError(InvalidRequest):
    """The model has no chat template, or it raised on these messages."""

    default_code = "template_error"


class DigestMismatch(InvalidRequest):
    """A request was begun on another model, tokenizer or adapter, so its tokens cannot be carried on here."""

    default_code = "digest_mismatch"


class MessageTooLarge(InvalidRequest):
    """The message exceeds the engine's limits. The SDK refuses it before it is sent, since a far larger one ends the connection."""

    default_code = "too_large"


class NotFound(InvalidRequest):
    """There is no such request."""

    default_code = "not_found"


class Retryable(PenstockError):
    """The request was fine; the same request may succeed later, at the earliest after `retry_after` seconds if that is set."""

    default_code = "unavailable"
    default_retryable = True


class Overloaded(Retryable):
    """A limit of the engine is reached. `retry_after` is in seconds."""

    default_code = "overloaded"


class Unavailable(Retryable):
    """The engine is not ready, or lost a part and is recovering it."""

    default_code = "unavailable"


class Draining(Retryable):
    """The engine finishes what is open and takes nothing new: use another one."""

    default_code = "draining"


class LeaseExpired(Retryable):
    """The client was silent for longer than its lease."""

    default_code = "lease_expired"


class ConnectionLost(Retryable):
    """No engine answers at the address (any more). Streams keep what they received: `stream.save()` can be resumed elsewhere."""

    default_code = "connection_lost"


class EngineFault(PenstockError):
    """The engine failed on this request; `actor` names the part that failed."""

    default_code = "engine_fault"


class ProtocolError(PenstockError):
    """The peer sent bytes that are no message, or took ours for none: the two are not of one kind."""

    default_code = "malformed"


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""

    default_code = "version"


class Unauthorized(PenstockError):
    """The engine does not know this client's key, or not any more: whoever runs it has to let the key in. Or only its operators may order
    what was ordered."""

    default_code = "unauthorized"


class StartError(PenstockError):
    """An engine could not start."""

    default_code = "start_error"


class ModelError(StartError):
    """An engine could not start because the model's files are missing, broken or not supported."""

    default_code = "model_error"


class ClientClosed(PenstockError):
    """The client was closed while it was used, was never opened, or is used outside the event loop that it belongs to."""

    default_code = "closed"


class OutputError(PenstockError):
    """A file of results cannot be written (a full disk, for one), or what it holds does not belong to the input."""

    default_code = "output_error"


_KINDS: tuple[type[PenstockError], ...] = (
    InvalidRequest, PromptTooLong, DuplicateRequest, UnknownAdapter, AdapterError, TemplateError, DigestMismatch, MessageTooLarge, NotFound,
    Overloaded, Unavailable, Draining, LeaseExpired, ConnectionLost, EngineFault, ProtocolError, VersionMismatch, Unauthorized, StartError,
    ModelError,
)  # fmt: skip
_BY_CODE = {kind.default_code: kind for kind in _KINDS} | {
    "too_many_elements": MessageTooLarge,
    "too_deep": MessageTooLarge,
    "unknown_message": ProtocolError,
}
_FIELDS: dict[str, tuple[type, ...]] = {
    "field": (str,), "value": (str,), "limit": (str,), "actor": (str,), "retryable": (bool,), "retry_after": (int, float),
}  # fmt: skip


def from_wire(error: Mapping[str, Any], request: str | None = None) -> PenstockError:
    """The exception for an error map of the protocol. Takes any map: an unknown code gives `PenstockError`, unknown fields are
    left out, and fields of the wrong type too, since an error that cannot be read must not hide the error that it tells of."""
    code, message = str(error.get("code", "error")), str(error.get("message", ""))
    known = {name: error[name] for name, kinds in _FIELDS.items() if isinstance(error.get(name), kinds)}
    return _BY_CODE.get(code, PenstockError)(message, code=code, request=request, **known)


def from_parameter(error: InvalidParameter) -> InvalidRequest:
    """The exception for a parameter that the table of fields refused."""
    return InvalidRequest(str(error), field=error.field, value=error.value, limit=error.limit)
