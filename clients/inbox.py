"""What one request has received so far, merged until its reader takes it.

A reader that keeps up gets one chunk for each message of the engine; one that is slow gets fewer and larger ones, and one that reads
nothing costs no more than its ids and its text. Nothing here is done for each token.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgpack

from penstock.actors.protocol import Generate
from penstock.clients.errors import InvalidRequest, PenstockError, ProtocolError, from_wire
from penstock.clients.values import Chunk, Completion, Sample, TokenLogprob, Usage, read_logprobs

SAVED_VERSION = 1


class Track:
    """One sample as it grows. `seen_*` count what the reader has taken; `fresh` says that it waits in the inbox's queue."""

    __slots__ = (
        "facts",
        "fresh",
        "ids",
        "inbox",
        "index",
        "logprobs",
        "reason",
        "seen_ids",
        "seen_logprobs",
        "seen_texts",
        "stream",
        "texts",
    )

    def __init__(self, inbox: Inbox, index: int) -> None:
        self.inbox, self.index = inbox, index
        self.ids = array("i")
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.seen_ids = self.seen_texts = self.seen_logprobs = 0
        self.stream = -1  # its number on the present connection
        self.fresh = False
        self.reason: str | None = None
        self.facts: Mapping[str, Any] = {}

    def touch(self) -> None:
        if not self.fresh:
            self.fresh = True
            self.inbox.fresh.append(self)

    def sample(self) -> Sample:
        fault = self.facts.get("error")
        error = from_wire(fault, self.inbox.request) if isinstance(fault, Mapping) else None
        logprobs = tuple(self.logprobs) if self.inbox.wants_logprobs else None
        return Sample("".join(self.texts), self.ids.tolist(), self.reason, self.facts.get("stop"), logprobs, error)


class Inbox:
    """One request, from the moment it is asked for until its terminal message, over as many connections as it takes.

    `order` is what to send, `resolved` what `Accepted` returned. `wake` is called by the driver when there is news and `waiting` is set,
    or when the request is `over`; it must be cheap and must not raise. `error` is set if the request failed.
    """

    __slots__ = (
        "answered", "cancelled", "error", "first", "fresh", "order", "over", "prompt_logprobs", "request", "resolved", "since", "total_s",
        "tracks", "usage", "waiting", "wake", "wants_logprobs",
    )  # fmt: skip

    def __init__(self, order: Generate, wake: Callable[[], None], now: float) -> None:
        self.request, self.order, self.wake, self.since = order.request, order, wake, now
        self.tracks: list[Track] = []
        self.fresh: deque[Track] = deque()
        self.resolved: dict[str, Any] | None = None
        self.usage = Usage()
        self.error: PenstockError | None = None
        self.over = self.waiting = self.cancelled = False
        self.answered = False  # whether the engine has taken it, on the present connection
        self.first: float | None = None
        self.total_s = 0.0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.wants_logprobs = order.params.get("logprobs") is not None

    # What the connection reports.

    def accept(self, streams: int, resolved: dict[str, Any]) -> list[Track]:
        """The engine took the request (again). Raises `ProtocolError` if it has another number of samples than before."""
        self.answered = True
        if not self.tracks:
            self.tracks = [Track(self, index) for index in range(streams)]
        if not 0 < streams == len(self.tracks):
            raise ProtocolError(f"request {self.request} has {len(self.tracks)} samples, and was accepted with {streams}")
        self.resolved = {name: value for name, value in resolved.items() if name != "received"}
        self.order = replace(self.order, prompt=None, messages=None, ids=None)  # may be large, and is in `resolved`
        return self.tracks

    def next_order(self, now: float) -> Generate:
        """What to send: the request as it was asked for, or resumed from what is here; with the time that it has left."""
        order = self.order
        left = None if order.deadline is None else max(0.001, order.deadline - (now - self.since))
        resolved = self.resolved if self.resolved is not None else order.resume
        if resolved is None:
            return order if left is None else replace(order, deadline=left)
        # It has waited its turn in the queue before: to wait again after a crash must not end it.
        received = [track.ids.tobytes() for track in self.tracks]
        return replace(order, params={}, options={}, deadline=left, queue_timeout=None, resume={**resolved, "received": received})

    def detail(self, track: Track, row: Sequence[Any]) -> None:
        """`[tokens]` for the next tokens of the stream, or `["prompt", tokens]`."""
        if row[0] == "prompt":
            self.prompt_logprobs = tuple(read_logprobs(row[1]))
        else:
            track.logprobs.extend(one for one in read_logprobs(row[0]) if one is not None)

    def end(self, track: Track, reason: str, facts: Mapping[str, Any]) -> None:
        if track.reason is None:  # a resumed stream is told of its end again
            track.reason, track.facts = reason, facts
            track.touch()

    def finish(self, usage: Mapping[str, Any], now: float) -> None:
        self.usage, self.over, self.total_s = Usage.from_wire(usage), True, now - self.since

    def fail(self, error: PenstockError, now: float) -> None:
        if not self.over:
            error.request = self.request
            self.error, self.over, self.total_s = error, True, now - self.since

    def finish_unbegun(self, reason: str, now: float) -> None:
        """End a request that the engine has not accepted, or where there is none to ask."""
        self.tracks = self.tracks or [Track(self, index) for index in range(self.order.params.get("n", 1))]
        for track in self.tracks:
            self.end(track, reason, {})
        self.finish({}, now)

    @property
    def tokens(self) -> int:
        """Ids received so far, of all samples."""
        return sum(len(track.ids) for track in self.tracks)

    # What the reader takes.

    def take(self) -> Chunk | None:
        """Everything that is new of one sample, or nothing. Samples take turns."""
        if not self.fresh:
            return None
        track = self.fresh.popleft()
        track.fresh = False
        ids, texts, first, read = track.ids, track.texts, track.seen_ids, track.seen_texts
        track.seen_ids, track.seen_texts = len(ids), len(texts)
        text = texts[read] if track.seen_texts == read + 1 else "".join(texts[read:])
        logprobs = None
        if self.wants_logprobs:
            logprobs, track.seen_logprobs = tuple(track.logprobs[track.seen_logprobs :]), len(track.logprobs)
        return Chunk(text, ids[first:].tolist(), track.index, track.reason, logprobs)

    def completion(self) -> Completion:
        """The whole of it. Raises the request's error if it failed."""
        if self.error is not None:
            raise self.error.again()
        resolved = self.resolved or {}
        prompt, params = resolved.get("prompt"), resolved.get("params")
        seed = params.get("seed") if isinstance(params, Mapping) else None
        return Completion(
            self.request,
            tuple(track.sample() for track in self.tracks),
            self.usage,
            seed if isinstance(seed, int) else None,
            array("i", prompt).tolist() if isinstance(prompt, bytes) and len(prompt) % 4 == 0 else [],
            self.prompt_logprobs,
            None if self.first is None else self.first - self.since,
            self.total_s,
        )

    # Saving and resuming by hand.

    def save(self) -> dict[str, Any]:
        """A plain map of texts, numbers and lists, for msgpack or JSON, from which any client of an equal engine can carry on."""
        order = self.order
        begun = self.resolved if self.resolved is not None else order.resume
        fresh = [order.prompt, order.messages, order.ids, order.params, order.options, order.adapter] if begun is None else None
        return {
            "version": SAVED_VERSION,
            "request": self.request,
            "resolved": None if begun is None else _pack({name: value for name, value in begun.items() if name != "received"}),
            "order": None if fresh is None else _pack(fresh),
            "priority": order.priority,
            "tenant": order.tenant,
            "logprobs": self.wants_logprobs,
            "samples": [
                {
                    "ids": track.ids.tolist(),
                    "text": "".join(track.texts),
                    "logprobs": _plain(track.logprobs),
                    "finish_reason": track.reason,
                    "facts": dict(track.facts),
                }
                for track in self.tracks
            ],
        }


def restore(saved: Mapping[str, Any], wake: Callable[[], None], now: float, token: str | None = None) -> Inbox:
    """An inbox that carries on from what `Inbox.save` returned, which has no `token` of its adapter's source. Raises `InvalidRequest` if
    that is not what it is given."""
    try:
        if saved["version"] != SAVED_VERSION:
            raise ValueError(f"version {saved['version']}")
        resolved = None if saved["resolved"] is None else _unpack(saved["resolved"])
        prompt, messages, ids, params, options, adapter = (None, None, None, {}, {}, None) if resolved else _unpack(saved["order"])
        order = Generate(
            saved["request"], prompt, messages, ids, params, options, adapter, saved["priority"], saved["tenant"], None, None, resolved,
            token,
        )  # fmt: skip
        inbox = Inbox(order, wake, now)
        inbox.wants_logprobs = bool(saved["logprobs"])
        for index, sample in enumerate(saved["samples"]):
            track = Track(inbox, index)
            track.ids, track.texts = array("i", sample["ids"]), [sample["text"]]
            track.logprobs = [row for row in read_logprobs(sample["logprobs"]) if row is not None]
            track.seen_ids, track.seen_texts, track.seen_logprobs = len(track.ids), 1, len(track.logprobs)
            track.reason, track.facts = sample["finish_reason"], dict(sample["facts"])
            inbox.tracks.append(track)
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error, msgpack.UnpackException, ProtocolError) as error:
        limit = f"a map that `save` of this version ({SAVED_VERSION}) returned"
        raise InvalidRequest(f"saved: must be {limit}: {error!r}", field="saved", value=repr(saved)[:120], limit=limit) from error
    return inbox


def _plain(rows: Sequence[TokenLogprob]) -> list[Any]:
    return [[row.id, row.logprob, row.rank, [list(pair) for pair in row.top]] for row in rows]


def _pack(value: Any) -> str:
    return base64.b64encode(msgpack.packb(value)).decode("ascii")


def _unpack(text: str) -> Any:
    return msgpack.unpackb(base64.b64decode(text, validate=True), use_list=False, strict_map_key=False)
