"""The client for programs that block: the same as `AsyncClient`, with a thread of its own for the connection."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from penstock.actors.protocol import Generate, List, Status
from penstock.clients.address import default_address
from penstock.clients.connection import Connection
from penstock.clients.control import EVERY_S, Restart, adapter_order, drain, row_of
from penstock.clients.errors import ClientClosed
from penstock.clients.inbox import Inbox, restore
from penstock.clients.link import Keys
from penstock.clients.order import Message, Prompt, build, check_positive, check_token, refuse
from penstock.clients.query import Question
from penstock.clients.sync_map import map_prompts
from penstock.clients.sync_stream import Stream
from penstock.clients.thread import Pump
from penstock.clients.values import Completion, Outcome


class Client:
    """A connection to the engine at `address` (none: the one that `penstock serve` started last on this machine).

        with Client() as client:
            for chunk in client.stream("Once upon a time", max_tokens=50):
                print(chunk.text, end="")

    Opening waits up to `connect_timeout` seconds for an engine that is ready. When the connection breaks it is made again, and every
    open request carries on from what was received; requests fail with `ConnectionLost` once no engine has answered for `patience` seconds.
    `tenant` is whom the requests are counted for, `name` appears in the engine's status, `keys` are for an engine that asks for them.

    Any number of threads may use one client. The lease is renewed by the client's own thread, also while the program computes. In
    a forked child a client makes a connection of its own; streams of the parent stay with the parent.
    """

    def __init__(
        self, address: str | None = None, *, name: str = "", tenant: str = "", connect_timeout: float | None = 60.0, patience: float = 30.0,
        keys: Keys | None = None,
    ) -> None:  # fmt: skip
        self.address = address
        self._name, self._tenant, self._keys = name, tenant, keys
        self._connect_timeout = None if connect_timeout is None else check_positive("connect_timeout", connect_timeout)
        self._patience = check_positive("patience", patience)
        self._pump: Pump | None = None

    def open(self, ready: bool = True) -> None:
        """Connect. `ready=False` does not wait: requests and `status` wait for the engine themselves. Raises `ConnectionLost` if no
        engine answers, `Unavailable` if it does not become ready in time, `InvalidRequest` for an address that cannot be."""
        if self._pump is None:
            self._pump = self._new_pump()
        try:
            if ready:
                self._pump.wait_ready(self._connect_timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave: open requests end in the engine at once, and raise `ClientClosed` here."""
        if self._pump is not None and self._pump.pid == os.getpid():
            self._pump.close()
        self._pump = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def model(self) -> dict[str, Any]:
        """Facts about the model that is served; empty before the engine is ready."""
        welcome = self._here().connection.welcome
        return {} if welcome is None else dict(welcome.model)

    @property
    def limits(self) -> dict[str, Any]:
        """The engine's limits; empty before it is ready."""
        welcome = self._here().connection.welcome
        return {} if welcome is None else dict(welcome.limits)

    def stream(self, prompt: Prompt, **params: Any) -> Stream:
        """Begin a request and read it as it runs. `prompt` is text, or token ids. `params` are the fields of `SamplingParams` and
        `PromptOptions` (or `params=SamplingParams(…)`), and `request` (an id of your own), `adapter` and `adapter_token`, `priority`
        (higher runs first), `tenant`, `deadline` and `queue_timeout` (seconds). Raises `InvalidRequest`; all else is raised by the
        stream."""
        return self._stream(build(prompt, **self._defaults(params)))

    def generate(self, prompt: Prompt, **params: Any) -> Completion:
        """The whole completion; parameters as of `stream`. Raises what the request failed with."""
        return self.stream(prompt, **params).completion()

    def chat_stream(self, messages: Sequence[Message], **params: Any) -> Stream:
        """Like `stream`, for a chat: maps with `role` and `content`, rendered by the model's chat template."""
        return self._stream(build(messages=messages, **self._defaults(params)))

    def chat(self, messages: Sequence[Message], **params: Any) -> Completion:
        """Like `generate`, for a chat."""
        return self.chat_stream(messages, **params).completion()

    def resume(self, saved: Mapping[str, Any], *, adapter_token: str | None = None) -> Stream:
        """Carry on from `stream.save()`, in this program or another, on an engine with the same model (another fails it with
        `DigestMismatch`): the stream gives what comes after what was saved, and its completion is whole. `adapter_token` is what the source
        of its adapter wants: that is not saved. Raises `InvalidRequest`."""
        pump, bell = self._here(), threading.Event()
        inbox = restore(saved, bell.set, time.monotonic(), check_token(adapter_token))
        pump.start(inbox)
        return Stream(pump, inbox, bell)

    def cancel(self, *requests: str) -> None:
        """End requests of this client by id. Unknown ids are ignored."""
        self._here().cancel(*requests)

    def requests(self) -> list[dict[str, Any]]:
        """The client's open requests, as the engine sees them: request, state, prompt_tokens, generated_tokens, age (seconds)."""
        return [dict(row) for row in self._ask(List)]

    def status(self) -> dict[str, Any]:
        """The engine's report: state, model, requests, tokens, scheduler, actors."""
        return dict(self._ask(Status))

    def adapters(self) -> list[dict[str, Any]]:
        """The adapters that the engine knows by name: name, source, state (cold, loading, host or failed; and of those that requests want:
        waiting, loading, resident or draining), pinned, and once they are known digest, rank, pages, and the streams and tokens."""
        return [dict(row) for row in (self._ask(adapter_order("list")))["adapters"]]

    def load_adapter(self, name: str, source: str | None = None, *, token: str | None = None) -> dict[str, Any]:
        """Make ready what is at a source, under a name, which may be new or in use: streams that have begun go on with what they have.
        Without a source: what is there now at that of the name. `token` is what the source wants, of every request by this name from now
        on. Returns its row of `adapters`. Raises `AdapterError`, and `Unauthorized` as `drain` does."""
        rows = self._ask(adapter_order("load", name, source, check_token(token)))
        return row_of(rows, name)

    def unload_adapter(self, name: str) -> None:
        """Forget a name. Streams that have begun go on. Raises `UnknownAdapter`, and `Unauthorized` as `drain` does."""
        self._ask(adapter_order("unload", name))

    def pin_adapter(self, name: str, pinned: bool = True) -> dict[str, Any]:
        """Keep an adapter on the device, or no longer. At most half of the pages can be pinned. Returns its row of `adapters`. Raises
        `UnknownAdapter`, `AdapterError`, `InvalidRequest` if it does not fit, and `Unauthorized` as `drain` does."""
        rows = self._ask(adapter_order("pin" if pinned else "unpin", name))
        return row_of(rows, name)

    def drain(self) -> int:
        """Have the engine finish what is open, refuse what is new with `Draining`, and then end. Returns how many requests are open, once
        it does so. Harmless twice. Raises `Unauthorized` for one who is not an operator of an engine with keys."""
        report = self._ask(drain)
        return int(report["requests"]["open"])

    def restart(self, actor: str) -> dict[str, Any]:
        """Replace one actor of the engine, such as `executor` or `tokenizer/1`; no stream is lost. Returns its row of the status when the
        new one is ready. Raises `InvalidRequest` for a name that nobody has, and `Unauthorized` as `drain` does."""
        restart = Restart(actor)
        while (row := restart.take(self._ask(restart.question))) is None:
            time.sleep(EVERY_S)
        return row

    def map(
        self, prompts: Iterable[Any], *, concurrency: int = 64, ordered: bool = True, retries: int = 10, **params: Any
    ) -> Iterator[Outcome]:
        """An outcome for each prompt: a completion or an error, so that one bad prompt does not end the others. A prompt is text, token
        ids, a list of messages, or a map of arguments of `generate`. At most `concurrency` run at once; prompts are taken from their
        source as places become free, and results are in order or as completed. What the engine is too busy for is asked for again, at
        most `retries` times. Leaving the loop cancels what runs. An error of the source itself is raised at once."""
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise refuse("concurrency", concurrency, "an integer above 0")
        return map_prompts(self._here(), prompts, concurrency, ordered, retries, self._defaults(params))

    def _stream(self, order: Generate) -> Stream:
        pump, bell = self._here(), threading.Event()
        inbox = Inbox(order, bell.set, time.monotonic())
        pump.start(inbox)
        return Stream(pump, inbox, bell)

    def _ask(self, question: Callable[[int], Question]) -> Any:
        pump, bell = self._here(), threading.Event()
        query = pump.call(lambda connection, now: connection.ask(question, bell.set, now))
        bell.wait()
        if query.error is not None:
            raise query.error
        return query.answer

    def _defaults(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"tenant": self._tenant, **params}

    def _here(self) -> Pump:
        """The pump of this process; a forked child gets a new one, and must not touch what it inherited, its lock least of all."""
        if self._pump is None:
            raise ClientClosed("the client is not open: use `with Client(…) as client`")
        if self._pump.pid != os.getpid():
            self._pump = self._new_pump()
        return self._pump

    def _new_pump(self) -> Pump:
        address = self.address or default_address()
        return Pump(address, self._keys, Connection(uuid.uuid4().hex, self._name, self._patience, time.monotonic()))
