"""The detokenizer actor: ids in, text out, one message a step each way. All decoding is engine.detokenize's."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from penstock.actors.actor import GATEWAY, SCHEDULER, Actor
from penstock.actors.errors import Refusal
from penstock.actors.messages import Abort, Emitted, Released
from penstock.actors.tokenizer import tokenizer_source
from penstock.engine.detokenize import Detokenizer, NullDetokenizer, NullStream, TextStream
from penstock.engine.tokenfiles import TokenizeError


@dataclass(slots=True, eq=False)
class Live:
    """A stream being decoded. `seen` tokens came in, `released` went out; `details` are log-probabilities of those between."""

    attempt: int
    stream: TextStream | NullStream
    push: Callable[[int], str | None]
    seen: int
    released: int
    details: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Outgoing:
    """The columns of one `Released` message, as they fill."""

    handles: array[int] = field(default_factory=lambda: array("q"))
    attempts: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("i"))
    counts: array[int] = field(default_factory=lambda: array("i"))
    ids: array[int] = field(default_factory=lambda: array("i"))
    texts: list[str] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    details: list[Any] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)

    def row(self, handle: int, attempt: int, offset: int, ids: Any, text: str) -> None:
        self.handles.append(handle)
        self.attempts.append(attempt)
        self.offsets.append(offset)
        self.counts.append(len(ids))
        self.ids.extend(ids)
        self.texts.append(text)

    def message(self, index: int, number: int) -> Released:
        return Released(
            index, number, self.handles.tobytes(), self.attempts.tobytes(), self.offsets.tobytes(), self.counts.tobytes(),
            self.ids.tobytes(), tuple(self.texts), tuple(self.ends), tuple(self.details), tuple(self.prompts),
        )  # fmt: skip


class DetokenizerActor(Actor):
    """A stop string ends a stream here: the scheduler is told to abort it, and its end is told when the scheduler's mark arrives with
    the facts, so that every stream has one end, in order with its data."""

    kind = "detokenizer"

    def start(self) -> dict[str, Any]:
        source = tokenizer_source(self.config)
        try:
            self.detokenizer = NullDetokenizer() if source is None else Detokenizer.load(source)
        except TokenizeError as error:
            raise Refusal(error.code, str(error), field="tokenizer", actor=self.kind) from error
        self.streams: dict[int, Live] = {}
        self.scheduler = 0  # incarnation of the newest that was heard
        self.handlers[Emitted] = self._emitted
        self.awaits[Emitted] = lambda message: (
            (SCHEDULER, message.scheduler), (GATEWAY, max((opened[0] >> 32 for opened in message.opens), default=0)),
        )  # fmt: skip
        return {}

    def _emitted(self, message: Emitted) -> None:
        if message.scheduler < self.scheduler:
            return  # from one that is no more: its streams are opened anew
        self.scheduler = message.scheduler
        if message.number == 1:
            self.streams.clear()  # the scheduler began anew: every stream that counts is opened again
        out = Outgoing()
        aborts: dict[int, int] = {}  # handle → attempt
        for opened in message.opens:
            self._begin(opened, out, aborts)
        out.prompts = list(message.prompts)
        # A token that ends its stream is released, but not its text: so it must be known before it is decoded.
        closing = {handle for handle, _, reason, _ in message.ends if reason == "stop"}
        last: dict[int, int] = {}
        for row, token in message.details:
            live = self.streams.get(memoryview(message.handles).cast("q")[row])
            if live is not None:
                live.details.append(token)
        self._decode(message, closing, last, out, aborts)
        for handle, attempt, reason, facts in message.ends:
            live = self.streams.get(handle)
            if live is not None and live.attempt == attempt:
                self._end(handle, live, reason, facts, last.get(handle), out)
        if aborts:
            self.mail.send(SCHEDULER, Abort(array("q", aborts).tobytes(), array("i", aborts.values()).tobytes()))
        self.mail.send(GATEWAY, out.message(self.post.index, message.number))

    def _decode(self, message: Emitted, closing: set[int], last: dict[int, int], out: Outgoing, aborts: dict[int, int]) -> None:
        """The hot path. `last` gets the closing token of each stream in `closing`."""
        streams = self.streams
        handles, attempts, offsets = out.handles, out.attempts, out.offsets
        counts, ids, texts = out.counts, out.ids, out.texts
        for handle, attempt, offset, token in zip(
            memoryview(message.handles).cast("q").tolist(),
            memoryview(message.attempts).cast("i").tolist(),
            memoryview(message.offsets).cast("i").tolist(),
            memoryview(message.ids).cast("i").tolist(),
            strict=True,
        ):
            live = streams.get(handle)
            if live is None or live.attempt != attempt:
                continue
            if offset != live.seen:
                out.row(handle, attempt, offset, (), "")  # a gap: the gateway sees it by the offset, and hands over
                del streams[handle]
                continue
            live.seen += 1
            if handle in closing:
                last[handle] = token
                continue
            text = live.push(token)
            if text is None:
                continue
            handles.append(handle)
            attempts.append(attempt)
            offsets.append(live.released)
            texts.append(text)
            released = live.stream.ids
            if released is None:
                counts.append(1)
                ids.append(token)
                live.released += 1
            else:
                counts.append(len(released))
                ids.extend(released)
                live.released += len(released)
                if live.stream.matched is not None:
                    aborts[handle] = attempt
            if live.details:
                self._tell_details(handle, live, out)

    def _begin(self, opened: tuple[Any, ...], out: Outgoing, aborts: dict[int, int]) -> None:
        handle, attempt, decode, *known = opened
        prompt, generated = (array("i", ids) for ids in known)
        try:
            stream = self.detokenizer.open(prompt, generated, stop=decode["stop"], skip_special_tokens=decode["skip_special_tokens"])
        except TokenizeError as error:
            out.ends.append((handle, attempt, "error", {"error": str(error), "code": error.code, "generated": len(generated)}))
            aborts[handle] = attempt
            return
        self.streams[handle] = Live(attempt, stream, stream.push, len(generated), len(generated))
        if decode.get("echo"):
            text = self.detokenizer.text(prompt, skip_special_tokens=decode["skip_special_tokens"])
            out.row(handle, attempt, len(generated), (), text)
        if stream.matched is not None:  # what was released before already ended it
            aborts[handle] = attempt

    def _end(self, handle: int, live: Live, reason: str, facts: dict[str, Any], closing: int | None, out: Outgoing) -> None:
        del self.streams[handle]
        if reason == "adapter_lost":  # it goes on, and what is held back comes again
            out.ends.append((handle, live.attempt, reason, {**facts, "generated": live.released}))
            return
        text = live.stream.finish(closing)
        ids = live.stream.ids or ()
        if ids or text:
            out.row(handle, live.attempt, live.released, ids, text)
            live.released += len(ids)
        if live.details:
            self._tell_details(handle, live, out)
        facts = {**facts, "generated": live.released}
        if live.stream.matched is not None:
            reason, facts["stop"] = "stop", live.stream.matched
        elif reason == "stop":
            facts["stop"] = closing
        out.ends.append((handle, live.attempt, reason, facts))

    def _tell_details(self, handle: int, live: Live, out: Outgoing) -> None:
        """Log-probabilities of the tokens that are released by now."""
        count = len(live.details) - (live.seen - live.released)
        if count > 0:
            out.details.append((handle, live.attempt, live.details[:count]))
            del live.details[:count]

    def load(self) -> dict[str, Any]:
        return {"streams": len(self.streams)}
