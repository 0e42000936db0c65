"""A client that comes, asks for a few things at once, and leaves in one of the ways in which clients leave."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from typing import Any

import zmq
import zmq.asyncio

from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY, Cancel, Chunks, Failed, Generate, Goodbye, Hello, Renew, Welcome

FATES = ("stays", "says goodbye", "vanishes", "cancels")
REQUESTS = 10
PATIENCE_S = 60.0


class Comer:
    """`seen` counts fates, ends by reason, and errors by code."""

    def __init__(self, context: zmq.asyncio.Context, address: str, number: int, seen: Counter[str]) -> None:
        self._draw = random.Random(number)
        self._name, self._seen = f"comer {number}", seen
        self._fate = self._draw.choice(FATES)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200 if self._fate == "says goodbye" else 0)
        self._socket.connect(address)

    async def live(self) -> None:
        """Raises `TimeoutError` if the engine owes it something and says nothing."""
        draw, fate = self._draw, self._fate
        await self._say(Hello(self._name, self._name))
        while not isinstance(await self._hear(), Welcome):
            pass
        open_requests = {f"r{number}" for number in range(REQUESTS)}
        for request in sorted(open_requests):
            await self._say(self._order(request))
        self._seen[fate] += 1
        patience = 10**9 if fate == "stays" else draw.randint(1, 12)  # messages until it leaves
        while open_requests:
            message = await self._hear()
            if isinstance(message, Chunks):
                await self._say(Renew(message.number))
                self._seen.update(reason for _, reason, _ in message.ends)
                open_requests -= {request for request, _ in message.done}
            elif isinstance(message, Failed) and message.request is not None:
                self._seen[message.error["code"]] += 1
                open_requests.discard(message.request)
            patience -= 1
            if patience == 0 and fate == "cancels":
                await self._say(Cancel(tuple(open_requests)))
            elif patience <= 0 and fate != "cancels":
                break
        if fate != "vanishes":
            await self._say(Goodbye())
        self._socket.close()

    def _order(self, request: str) -> Generate:
        draw = self._draw
        prompt = f"{request} of {self._name}" if draw.random() < 0.5 else None
        ids = None if prompt else array("i", [draw.randrange(3, 2000) for _ in range(draw.randint(1, 200))]).tobytes()
        params = {"max_tokens": draw.choice((1, 20, 300)), "n": draw.choice((1, 1, 1, 3))}
        return Generate(request, prompt, None, ids, params, {}, None, 0, self._name, None, None, None, None)

    async def _say(self, message: Any) -> None:
        await self._socket.send(TO_GATEWAY.encode(message))

    async def _hear(self) -> Any:
        return TO_CLIENT.decode(await asyncio.wait_for(self._socket.recv(), PATIENCE_S))
