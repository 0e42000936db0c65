"""The codec: msgpack arrays `[version, tag, field, ...]`, one frame a message, limits checked before anything is built.

Decoding makes objects up to 75 times larger than their bytes (8 MB of empty arrays become 604 MB), and msgpack itself bounds neither
depth nor the total. So bytes from outside are walked once, header by header, against a budget before they are decoded.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, TypeVar

import msgpack

VERSION = 1

M = TypeVar("M")


class WireError(ValueError):
    """A frame that is not a message: `code` is stable, the text says what was wrong and what the limit is."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a frame may cost, checked before decoding. `bytes` of the frame, `elements` in all its containers, nesting `depth`."""

    bytes: int = 16 * 2**20
    elements: int = 65_536
    depth: int = 12


@dataclass(frozen=True, slots=True)
class _Layout:
    tag: int
    kind: type[Any]
    values: Callable[[Any], Any]
    accepts: tuple[tuple[str, tuple[type, ...]], ...]  # field name, types that the field takes


def _accepts(hint: Any) -> tuple[type, ...]:
    """The plain types a field takes, outermost only: `tuple[int, ...] | None` takes list, tuple and None."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _accepts(part))
    if origin is tuple or hint is tuple:
        return (list, tuple)
    if hint is float:
        return (float, int)
    if hint is Any:
        return (object,)
    return (origin or hint,)


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: tuple(getattr(message, name) for name in names)  # attrgetter of one name gives no tuple


class Catalogue:
    """The messages that may travel over one kind of socket, each under a number that is part of the protocol."""

    def __init__(self, messages: dict[int, type[Any]]) -> None:
        self._by_tag: dict[int, _Layout] = {}
        self._by_type: dict[type[Any], _Layout] = {}
        for tag, kind in messages.items():
            hints = typing.get_type_hints(kind)
            names = [spec.name for spec in fields(kind)]
            layout = _Layout(tag, kind, _getter(names), tuple((name, _accepts(hints[name])) for name in names))
            self._by_tag[tag] = self._by_type[kind] = layout

    @property
    def kinds(self) -> list[type[Any]]:
        return list(self._by_type)

    def encode(self, message: Any) -> bytes:
        layout = self._by_type[type(message)]
        return msgpack.packb((VERSION, layout.tag, *layout.values(message)), use_bin_type=True)  # type: ignore[no-any-return]

    def decode(self, frame: bytes | memoryview) -> Any:
        """Decode a frame from a peer that we started ourselves."""
        body = msgpack.unpackb(frame, use_list=False, strict_map_key=True, max_ext_len=0)
        return self._by_tag[body[1]].kind(*body[2:])

    def decode_untrusted(self, frame: bytes, limits: Limits) -> Any:
        """Decode a frame from anyone. Raises `WireError` and never anything else, whatever the bytes."""
        check_budget(frame, limits)
        try:
            body = msgpack.unpackb(frame, use_list=False, strict_map_key=True, max_ext_len=0)
        except (ValueError, TypeError, UnicodeDecodeError, RecursionError, msgpack.UnpackException) as error:
            raise WireError("malformed", f"not msgpack: {error}") from error
        if not isinstance(body, tuple) or len(body) < 2 or type(body[0]) is not int or type(body[1]) is not int:
            raise WireError("malformed", "a message is an array of version, tag and fields")
        if body[0] != VERSION:
            raise WireError("version", f"protocol version {body[0]} is not spoken here: use {VERSION}")
        layout = self._by_tag.get(body[1])
        if layout is None:
            raise WireError("unknown_message", f"no message has the tag {body[1]}")
        if len(body) - 2 != len(layout.accepts):
            raise WireError("malformed", f"{layout.kind.__name__} has {len(layout.accepts)} fields, not {len(body) - 2}")
        for value, (name, accepts) in zip(body[2:], layout.accepts, strict=True):
            if not isinstance(value, accepts) or (isinstance(value, bool) and bool not in accepts and object not in accepts):
                raise WireError("malformed", f"{layout.kind.__name__}.{name} is of type {type(value).__name__}")
        return layout.kind(*body[2:])


# Header bytes that carry a fixed number of payload bytes after them, and nothing nested.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: bytes of the length field
_NESTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # array and map: length field, values an entry


def check_budget(frame: bytes, limits: Limits) -> None:
    """Walk the headers of a frame; raise `WireError` if it is cut short, or exceeds `limits`. Builds nothing."""
    end = len(frame)
    if end > limits.bytes:
        raise WireError("too_large", f"a message of {end} bytes: the limit is {limits.bytes}")
    at, left = 0, limits.elements
    open_containers = [1]  # values still to come at each depth
    while open_containers:
        if open_containers[-1] == 0:
            open_containers.pop()
            continue
        open_containers[-1] -= 1
        left -= 1
        if left < 0:
            raise WireError("too_many_elements", f"more than {limits.elements} elements in a message")
        if at >= end:
            raise WireError("malformed", "the message is cut short")
        head = frame[at]
        at += 1
        nested = -1
        if head <= 0x7F or head >= 0xE0:
            continue
        if 0xA0 <= head <= 0xBF:
            at += head & 0x1F
        elif 0x90 <= head <= 0x9F:
            nested = head & 0x0F
        elif 0x80 <= head <= 0x8F:
            nested = 2 * (head & 0x0F)
        elif head in _FIXED:
            at += _FIXED[head]
        elif head in _SIZED:
            width = _SIZED[head]
            at += width + int.from_bytes(frame[at : at + width], "big")
        elif head in _NESTED:
            width, values = _NESTED[head]
            nested = values * int.from_bytes(frame[at : at + width], "big")
            at += width
        else:
            raise WireError("malformed", f"extension types are not accepted (byte 0x{head:02x})")
        if at > end:
            raise WireError("malformed", "the message is cut short")
        if nested >= 0:
            if nested > left:
                raise WireError("too_many_elements", f"more than {limits.elements} elements in a message")
            open_containers.append(nested)
            if len(open_containers) > limits.depth + 1:
                raise WireError("too_deep", f"nested deeper than {limits.depth}")
    if at != end:
        raise WireError("malformed", f"{end - at} bytes after the message")
