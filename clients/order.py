"""From a caller's arguments to the `Generate` message: everything that can be judged without the model is judged here, before sending."""

from __future__ import annotations

import math
import uuid
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from penstock.actors.protocol import TO_GATEWAY, Generate
from penstock.actors.wire import Limits, WireError
from penstock.clients.errors import InvalidRequest, MessageTooLarge, from_parameter
from penstock.engine.lora.recipe import Wish
from penstock.engine.params import HIGHEST_PRIORITY, LONGEST_NAME, InvalidParameter, PromptOptions, SamplingParams

LONGEST_TOKEN = 8192  # characters of what a source of adapters wants
Prompt = str | Iterable[int]
Message = Mapping[str, Any]

_OPTIONS = frozenset(spec.name for spec in fields(PromptOptions))
_SAMPLING = frozenset(spec.name for spec in fields(SamplingParams))
_ORDER = frozenset(("request", "adapter", "adapter_token", "priority", "tenant", "deadline", "queue_timeout"))
_ROLE = "a non-empty list of maps, each with a role (text) and content"


def build(
    prompt: Prompt | None = None,
    *,
    messages: Sequence[Message] | None = None,
    params: SamplingParams | None = None,
    request: str | None = None,
    adapter: str | Mapping[str, Any] | None = None,
    adapter_token: str | None = None,
    priority: int = 0,
    tenant: str = "",
    deadline: float | None = None,
    queue_timeout: float | None = None,
    **more: Any,
) -> Generate:
    """The message for one request. `prompt` is text or token ids, or `messages` a chat. `more` are fields of `SamplingParams` (over those
    of `params`) and of `PromptOptions`. `deadline` and `queue_timeout` are seconds from now; higher `priority` runs first; `request` is
    the caller's own id, unique among its open requests. `adapter` is the name of a LoRA adapter, its source, or several to be merged:
    `{"merge": ["a", "b"], "weights": [0.7, 0.3], "method": "ties", "density": 0.5}`; `adapter_token` is what its source wants. Raises
    `InvalidRequest` naming the field, the value and the limit."""
    if (prompt is None) == (messages is None):
        raise refuse("prompt", prompt, "given, or messages: exactly one of the two")
    text, ids = (prompt, None) if prompt is None or isinstance(prompt, str) else (None, _ids(prompt))
    if text == "":
        raise refuse("prompt", text, "a text of at least one character")
    options = {name: more.pop(name) for name in _OPTIONS.intersection(more)}
    for name in more:
        if name not in _SAMPLING:
            raise refuse(name, more[name], "one of the known names: " + ", ".join(sorted(_SAMPLING | _OPTIONS | _ORDER)))
    if params is not None and not isinstance(params, SamplingParams):
        raise refuse("params", params, "a SamplingParams, or its fields by themselves")
    try:
        if params is not None and more:
            more = {**params.to_wire(), **more}
        sampling = SamplingParams(**more) if params is None or more else params
        option_map = PromptOptions(**options).to_wire() if options else {}
        wish = None if adapter is None else Wish.from_wire(adapter).to_wire()
    except InvalidParameter as error:
        raise from_parameter(error) from None
    for name, value, least in (("request", request, 1), ("tenant", tenant, 0)):
        if (value is not None or name == "tenant") and not (isinstance(value, str) and least <= len(value) <= LONGEST_NAME):
            raise refuse(name, value, f"a text of {least} to {LONGEST_NAME} characters")
    deadline = None if deadline is None else check_positive("deadline", deadline)
    queue_timeout = None if queue_timeout is None else check_positive("queue_timeout", queue_timeout)
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > HIGHEST_PRIORITY:
        raise refuse("priority", priority, f"an integer from {-HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}")
    return Generate(
        request or uuid.uuid4().hex, text, _messages(messages), ids, sampling.to_wire(), option_map, wish, priority, tenant,
        deadline, queue_timeout, None, check_token(adapter_token),
    )  # fmt: skip


def encode(order: Generate, limits: Limits | None) -> bytes:
    """The frame, judged as the engine will: what it could not read it could not tie to a request either. `limits` are the engine's, if
    they are known. Raises `InvalidRequest`, `MessageTooLarge` among them."""
    limits = limits or Limits()
    try:
        frame = TO_GATEWAY.encode(order)
        TO_GATEWAY.decode_untrusted(frame, limits)
    except WireError as error:
        limit = {"too_large": limits.bytes, "too_many_elements": limits.elements, "too_deep": limits.depth}.get(error.code)
        if limit is None:
            raise refuse("request", str(error), "made of text, numbers, lists, and maps with text as keys") from None
        raise MessageTooLarge(str(error), code=error.code, field="request", value=order.request, limit=str(limit)) from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise refuse("request", str(error), "made of text (valid Unicode), numbers, lists and maps") from error
    return frame


def check_token(token: str | None) -> str | None:
    """What a source wants. It is not shown. Raises `InvalidRequest`."""
    if token is not None and not (isinstance(token, str) and 0 < len(token) <= LONGEST_TOKEN):
        raise refuse("adapter_token", "…", f"a text of 1 to {LONGEST_TOKEN} characters")
    return token


def check_positive(name: str, value: Any, limit: str = "a number of seconds above 0") -> float:
    """Raises `InvalidRequest`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise refuse(name, value, limit)
    return float(value)


def refuse(name: str, value: object, limit: str) -> InvalidRequest:
    shown = repr(value)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    return InvalidRequest(f"{name}={shown}: must be {limit}", field=name, value=shown, limit=limit)


def _ids(prompt: Any) -> bytes:
    """Token ids from a list, an array, or anything with `tolist`, such as a tensor."""
    limit = "text, or a non-empty list of token ids from 0 to 2147483647"
    if isinstance(prompt, bytes | bytearray | memoryview | Mapping):
        raise refuse("prompt", prompt, limit)
    try:
        ids = array("i", prompt.tolist() if hasattr(prompt, "tolist") else prompt)
    except (TypeError, OverflowError, ValueError):
        raise refuse("prompt", prompt, limit) from None
    if not ids or min(ids) < 0:
        raise refuse("prompt", prompt, limit)
    return ids.tobytes()


def _messages(messages: Any) -> tuple[Any, ...] | None:
    if messages is None:
        return None
    if not isinstance(messages, list | tuple) or not messages:
        raise refuse("messages", messages, _ROLE)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise refuse(f"messages[{index}]", message, _ROLE)
    return tuple(dict(message) for message in messages)
