"""Recordings: what a `RecordedScheduler` remembers, as bytes. msgpack, and nothing in it is ever run.

    [magic, version, text, attributes of each class, state, calls]

Unless text was asked for, no token id is in a recording, nor anything that one could be guessed from. The scheduler needs ids for
three things, and each has a stand-in from which it decides the same:

    the digests of full blocks    hashed once more, with a key that is drawn for this recording and forgotten: equal blocks stay equal,
                                  but nobody can try whether a guessed prompt gives them
    whether a sampled id stops    1 if it was one of the request's stop ids, else 0
    copies of ids in plans        left out, and so is what a sampler was told of ids and texts; a replay compares all other columns

What remains are sizes, times, handles, priorities, seeds, and the tenants' names (they break ties, by their order).
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import msgpack
import numpy as np

from penstock.engine.draft import Launched
from penstock.engine.lora.residency import Load
from penstock.engine.plan import Fill, Int32, StepPlan, StepResult
from penstock.engine.recorder import Call, RecordedScheduler
from penstock.engine.request import Adapter, Request, Sampler
from penstock.engine.scheduler import Scheduler, SchedulerConfig
from penstock.engine.slots import Slots, token_room
from penstock.engine.snapshot import PARTS, Snapshot, attributes
from penstock.engine.stream import Stream

MAGIC = "penstock recording"
VERSION = 2
STOP = 1  # stands for every stop id; all other ids are 0
# A recording of a few bytes must not ask for more memory than there is.
MOST_CELLS = 2**28  # of all arrays together
MOST_ROOM = 2**30  # tokens of running streams: of these, only what is used is ever touched
MOST_STOPS = 256  # stop ids of a request: each slot has room for as many as the longest list
COLUMNS = tuple(spec.name for spec in fields(StepPlan))

_VALUES = (Adapter, Launched, Load, Request, Sampler, SchedulerConfig, StepPlan, Stream)
_CLASSES: dict[str, type[Any]] = {kind.__name__: kind for kind in (*PARTS, *_VALUES)}
_LISTS: dict[str, Any] = {"list": list, "tuple": tuple, "deque": deque}
_MAPS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict}
_TAGS = {kind: tag for tag, kind in (_LISTS | _MAPS).items()}
_DTYPES = ("<i4", "<i8", "|b1")


class RecordingError(ValueError):
    """These bytes are not a recording that this version can replay."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A scheduler as it was, and the calls that followed. `calls[i].value` is a `Request`, a handle and a reason, or a `StepResult`;
    `calls[i].answer` are the digests of a request's blocks, or the `columns` of a plan. A replay uses it up."""

    scheduler: Scheduler
    calls: list[Call]
    text: bool


def columns(plan: StepPlan, *, text: bool) -> list[Any]:
    """What is compared of a plan, by the names in `COLUMNS`: its columns as bytes, and numbers. Without `text`, of ids only how many there
    are. Samplers are not in it but for what the scheduler reads: they pass through it."""
    return [_column(name, getattr(plan, name), text) for name in COLUMNS]


def _column(name: str, value: Any, text: bool) -> Any:
    if name == "fills":
        return [_fill(fill, text) for fill in value]
    if name == "tokens":
        return _ids(value, text)
    return value if type(value) is int else value.tobytes()


def _fill(fill: Fill, text: bool) -> list[Any]:
    # Numbers, whatever a broken recording made of them: anything else could not be compared.
    numbers = (fill.slot, fill.prompt_tokens, fill.sampler.seed, fill.sampler.prompt_logprobs, *fill.pages)
    return [*map(int, numbers), _ids(fill.history, text)]


def _ids(ids: Int32, text: bool) -> bytes | int:
    return ids.tobytes() if text else len(ids)


# ── writing ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(recorded: RecordedScheduler) -> bytes:
    """All that it remembers, as the bytes of a file."""
    writer = _Writer(recorded.start, recorded.text)
    state = writer.plain(recorded.start.scheduler)
    calls = [writer.call(call) for call in recorded.calls]
    packed: bytes = msgpack.packb([MAGIC, VERSION, recorded.text, writer.attributes, state, calls])
    return packed


class _Writer:
    """Values as lists `[tag, …]`. A part that is met again is `["again", number]`: identity is state too."""

    def __init__(self, start: Snapshot, text: bool) -> None:
        self.text = text
        self.attributes = {"StepPlan": list(COLUMNS)}  # a plan is written as its columns
        self._start = start
        self._key = secrets.token_bytes(32)
        self._seen: dict[int, int] = {}

    def call(self, call: Call) -> list[Any]:
        value, answer = call.value, None
        match call.kind:
            case "submit":
                value, answer = self.plain(value), self.plain(call.answer)
            case "pin" | "unpin":
                value = self.plain(value)
            case "plan" if call.answer is not None:
                answer = columns(call.answer, text=self.text)
            case "commit":
                step, ids, launched = value
                value = [step, self.plain(ids if self.text else _stops(ids, launched))]
        return [call.kind, call.now, call.done, value, answer]

    def plain(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is bytes:  # a digest or a salt; none is no secret
            return value if self.text or not value else blake2b(value, key=self._key, digest_size=16).digest()
        if kind is np.ndarray and value.dtype == object:
            return ["objects", [self.plain(entry) for entry in value.tolist()]]
        if kind is np.ndarray and value.dtype.str in _DTYPES:
            return ["array", value.dtype.str, list(value.shape), value.tobytes() if value.any() else None]
        if kind in (dict, OrderedDict):
            return [_TAGS[kind], [self.plain(key) for key in value], [self.plain(entry) for entry in value.values()]]
        if kind in _TAGS:
            return [_TAGS[kind], [self.plain(entry) for entry in value]]
        if _CLASSES.get(kind.__name__) is kind:
            return self._object(kind, value)
        raise TypeError(f"no recording can hold a {kind.__name__}: see engine.snapshot")

    def _object(self, kind: type[Any], value: Any) -> list[Any]:
        if kind in PARTS or kind is Stream:
            if id(value) in self._seen:
                return ["again", self._seen[id(value)]]
            self._seen[id(value)] = len(self._seen)
        names = self.attributes.setdefault(kind.__name__, attributes(kind, value))
        entries = self._start.of(value) if kind is Stream else {name: getattr(value, name) for name in names}
        if not self.text:
            entries |= _veil(value, entries)
        if kind is Scheduler:
            entries |= {"_ended": [], "_told": []}  # what was still to be said says nothing about plans
        elif kind is Stream:
            entries["prompt_parts"] = []
        return [kind.__name__, [self.plain(entry) for entry in entries.values()]]


def _veil(value: object, entries: dict[str, Any]) -> dict[str, Any]:
    """What takes the place of the ids in some objects. A sampler keeps only what the scheduler itself reads."""
    match value:
        case Request():
            return {"prompt": np.zeros_like(value.prompt), "generated": np.zeros_like(value.generated)}
        case Stream():
            return {"tokens": np.zeros_like(entries["tokens"])}
        case Slots():
            return {"stops": np.where(value.stops < 0, value.stops, np.int32(STOP))}
        case Adapter():
            return {"path": ""}
        case Sampler():
            neutral = Sampler(
                seed=value.seed, prompt_logprobs=value.prompt_logprobs, presence_penalty=float(value.counts_tokens),
                bad_words=((STOP,),) if value.bad_words else (), stop_ids=(STOP,) if value.stop_ids else (),
            )  # fmt: skip
            return {spec.name: getattr(neutral, spec.name) for spec in fields(Sampler)}
    return {}


def _stops(ids: Int32, launched: Launched | None) -> Int32:
    """`STOP` for each id of a step that is a stop id of its request."""
    stand_ins = np.zeros_like(ids)
    if launched is not None and len(launched.sampled) == len(ids):
        for row, (at, token) in enumerate(zip(launched.sampled.tolist(), ids.tolist(), strict=True)):
            if token in launched.streams[at].request.sampler.stop_ids:
                stand_ins[row] = STOP
    return stand_ins


# ── reading ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode(data: bytes) -> Recording:
    """Read a recording. Raises `RecordingError` for anything else. It bounds what arrays take, `check_budget` all that is not in them."""
    try:
        body = msgpack.unpackb(data, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise RecordingError(f"not msgpack: {error}") from error
    if not isinstance(body, list) or len(body) != 6 or body[0] != MAGIC:
        raise RecordingError("not a recording of a scheduler")
    _, version, text, names, state, calls = body
    if version != VERSION:
        raise RecordingError(f"a recording of version {version}: this is version {VERSION}")
    try:
        reader = _Reader(names)
        scheduler = reader.value(state)
        if type(scheduler) is not Scheduler:
            raise RecordingError("the state is not that of a scheduler")
        _make_room(scheduler.config, scheduler._slots)
        return Recording(scheduler, [reader.call(call, scheduler.config.slots) for call in calls], text is True)
    except RecordingError:
        raise
    except MemoryError as error:
        raise RecordingError(f"it takes more memory than there is: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise RecordingError(f"not a recording that could have been made: {type(error).__name__}: {error}") from error


class _Reader:
    """The values that a `_Writer` wrote, of the classes in its list and no others."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        example = Scheduler(SchedulerConfig(slots=1, blocks=1))
        instances = {"Scheduler": example, "Slots": example._slots, "Prefixes": example._prefixes}
        for name, recorded in names.items():
            if sorted(recorded) != sorted(attributes(_CLASSES[name], instances.get(name))):
                raise RecordingError(f"recorded by another version of Penstock: {name} has other attributes there")
        self._names = names
        self._seen: list[Any] = []
        self._cells = 0

    def call(self, plain: list[Any], slots: int) -> Call:
        kind, now, done, value, answer = plain
        match kind:
            case "submit":
                value, answer = self.value(value), self.value(answer)
                if type(value) is not Request:
                    raise RecordingError("what was submitted is not a request")
            case "commit":
                ids = self.value(value[1])
                if type(ids) is not np.ndarray or ids.ndim != 1 or len(ids) > slots:
                    raise RecordingError(f"the results of a step are not those of at most {slots} slots")
                value = StepResult(int(value[0]), ids.astype(np.int32))
            case "plan" if answer is not None:
                answer = dict(zip(COLUMNS, answer, strict=True))
            case "abort":
                value = int(value[0]), str(value[1])
            case "loaded" | "lost":
                value = int(value)
            case "pin":
                value = self.value(value)
                if type(value) is not Adapter:
                    raise RecordingError("what was pinned is not an adapter")
            case "unpin":
                value = bytes(value)
            case "plan" | "expire":
                pass
            case _:
                raise RecordingError(f"a scheduler has no input {kind!r}")
        return Call(kind, float(now), value, answer, done is True)

    def value(self, plain: Any) -> Any:
        if not isinstance(plain, list):
            return plain
        tag, *rest = plain
        match tag:
            case "again":
                return self._seen[rest[0]]
            case "array":
                return self._array(*rest)
            case "objects":
                entries = np.empty(len(rest[0]), object)
                entries[:] = [self.value(entry) for entry in rest[0]]
                return entries
            case "list" | "tuple" | "deque":
                return _LISTS[tag](self.value(entry) for entry in rest[0])
            case "dict" | "ordered":
                return _MAPS[tag](zip(map(self.value, rest[0]), map(self.value, rest[1]), strict=True))
        kind = _CLASSES[tag]
        made = object.__new__(kind)
        if kind in PARTS or kind is Stream:
            self._seen.append(made)
        for name, entry in zip(self._names[tag], rest[0], strict=True):
            object.__setattr__(made, name, self.value(entry))
        if kind is Sampler and len(made.stop_ids) > MOST_STOPS:
            raise RecordingError(f"{len(made.stop_ids)} stop ids: no request has more than {MOST_STOPS}")
        return made

    def _array(self, dtype: str, shape: list[int], data: bytes | None) -> Any:
        if dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise RecordingError(f"an array of {dtype!r} and shape {shape}")
        self._cells += math.prod(shape)
        if self._cells > MOST_CELLS:
            raise RecordingError(f"arrays of more than {MOST_CELLS} cells")
        return np.zeros(shape, dtype) if data is None else np.frombuffer(data, dtype).reshape(shape).copy()


def _make_room(config: SchedulerConfig, slots: Slots) -> None:
    """The tokens of running streams, of which only those that were known are recorded, or none."""
    known = slots.tokens
    if not 0 < config.slots * (config.max_model_len + 1) <= MOST_ROOM or config.slots * MOST_STOPS > MOST_CELLS:
        raise RecordingError(f"{config.slots} slots of {config.max_model_len} tokens")
    # What is served is counted for each of these numbers, so one of them is as good as a shape.
    if len(slots.stops) != config.slots or not ((slots.share >= 0) & (slots.share < config.slots)).all():
        raise RecordingError(f"slots that are not those of {config.slots} streams")
    slots.tokens = token_room(config.slots, config.max_model_len)
    slots.tokens[:, : known.shape[1]] = known
