"""A load that never ends by itself: the same streams again and again, each compared with its undisturbed run."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from penstock.clients.aio import AsyncClient
from penstock.clients.bench.pipeline import WORDS
from penstock.clients.bench.verdict import SAME, Told, judge, noisy_score
from penstock.clients.errors import PenstockError

SILENCE_S = 0.05  # shorter pauses of a stream are its own
_NOTICED_S = 0.25  # a kill silences a stream within this time, if it does


@dataclass(frozen=True, slots=True)
class Order:
    """One request: a text or ids, and its parameters."""

    prompt: str | list[int]
    params: dict[str, Any]


def mixed(streams: int, output: int, vocab: int, adapters: Sequence[str] = (), *, logprobs: bool) -> list[Order]:
    """Texts and ids in turn, a half of each greedy and a half seeded, `output` tokens at most and a quarter of that at least; with the base
    model and each of `adapters` in turn."""
    draw = random.Random(0)
    orders = []
    for number in range(streams):
        ids = [draw.randrange(vocab // 4, vocab // 2) for _ in range(20 + number)]
        params: dict[str, Any] = {"max_tokens": draw.randint(output // 4, output), "ignore_eos": True, "seed": number}
        params |= {"temperature": 0.0 if number % 4 < 2 else 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        if adapters and number % (len(adapters) + 1):
            params["adapter"] = adapters[number % (len(adapters) + 1) - 1]
        orders.append(Order(f"{number} {WORDS}" if number % 2 else ids, params | ({"logprobs": 0} if logprobs else {})))
    return orders


@dataclass(slots=True)
class Watch:
    """Waits for a stream's next token after something happened at `since`: that is the one which ends its first silence, if it fell
    silent, because what was on its way arrives all the same."""

    since: float
    last: float
    first: float | None = None
    broken: float | None = None  # when the silence ended

    def arrived(self, now: float) -> None:
        self.first = self.first or now
        if self.broken is None and now - self.last >= SILENCE_S and self.last - self.since <= _NOTICED_S:
            self.broken = now
        self.last = now

    @property
    def seconds(self) -> float | None:
        """None if no token came."""
        end = self.broken or self.first
        return None if end is None else end - self.since


@dataclass(slots=True)
class Load:
    """`orders` through `client`. `verdicts` counts how the streams compared, `odd` keeps what a few of the bad ones were."""

    client: AsyncClient
    orders: list[Order]
    vocab: int
    exact: bool = True  # float32: see `judge`
    verdicts: Counter[str] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)
    _undisturbed: list[tuple[Told, int]] = field(default_factory=list)  # with the prompt's tokens
    _open: set[int] = field(default_factory=set)
    _watches: dict[int, list[Watch]] = field(default_factory=dict)
    _over: bool = False

    async def measure(self) -> None:
        """The undisturbed runs. Raises what one of them failed with."""
        self._undisturbed = list(await asyncio.gather(*(self._run(number) for number in range(len(self.orders)))))
        for told, _ in self._undisturbed:
            if told.error is not None:
                raise PenstockError(f"an undisturbed stream failed: {told.error}")

    async def part(self) -> int:
        """How many streams part from their undisturbed run when they are run once more, undisturbed."""
        again = await asyncio.gather(*(self._run(number) for number in range(len(self.orders))))
        return sum(one.ids != other.ids for (one, _), (other, _) in zip(again, self._undisturbed, strict=True))

    @contextmanager
    def running(self) -> Iterator[asyncio.Future[Any]]:
        """Every order again and again, until this is left; what is begun is finished by `finish`."""
        self._over = False
        tasks = asyncio.gather(*(self._repeat(number) for number in range(len(self.orders))))
        try:
            yield tasks
        finally:
            self._over = True

    def watch(self) -> list[Watch]:
        """A watch on each stream that is open now."""
        now = time.monotonic()
        watches = {number: Watch(now, now) for number in self._open}
        for number, watch in watches.items():
            self._watches.setdefault(number, []).append(watch)
        return list(watches.values())

    async def _repeat(self, number: int) -> None:
        undisturbed, prompt_tokens = self._undisturbed[number]
        params = self.orders[number].params
        score = noisy_score(prompt_tokens, params["temperature"], params["seed"], self.vocab) if "logprobs" in params else None
        while not self._over:
            told, _ = await self._run(number)
            verdict = judge(told, undisturbed, score, exact=self.exact)
            self.verdicts[verdict] += 1
            if verdict != SAME and len(self.odd) < 20:
                facts = f"{len(told.ids)} of {len(undisturbed.ids)} ids: {told.error or told.reason}"
                self.odd.append(f"{verdict}: stream {number} gave {facts}")

    async def _run(self, number: int) -> tuple[Told, int]:
        """One stream, read chunk by chunk, as a user would."""
        order = self.orders[number]
        ids: list[int] = []
        texts: list[str] = []
        logprobs: list[float] = []
        try:
            stream = self.client.stream(order.prompt, **order.params)
            async for chunk in stream:
                if chunk.ids:
                    self._open.add(number)
                    now = time.monotonic()
                    for watch in self._watches.get(number, ()):
                        watch.arrived(now)
                ids += chunk.ids
                texts.append(chunk.text)
                logprobs += [one.logprob for one in chunk.logprobs or ()]
            whole = await stream.completion()
        except PenstockError as error:
            return Told(ids, "".join(texts), None, logprobs, f"{error.code}: {error.message}"), 0
        finally:
            self._open.discard(number)
            self._watches.pop(number, None)
        odd = None if whole.ids == ids and whole.text == "".join(texts) else "its chunks are not its completion"
        return Told(ids, "".join(texts), whole.finish_reason, logprobs, odd), len(whole.prompt_ids)
