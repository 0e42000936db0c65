"""Valid messages of every kind from a client, and what becomes of them when bytes or fields are changed at random."""

from __future__ import annotations

import copy
import random
from array import array
from typing import Any

import msgpack

from penstock.actors.protocol import TO_GATEWAY, Cancel, Control, Generate, Goodbye, Hello, List, Renew, Status

PARAMS: dict[str, Any] = {
    "max_tokens": 12, "min_tokens": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"5": 1.0}, "allowed_tokens": (3, 4, 5), "bad_words": ("bad", (7, 8)),
    "seed": 3, "n": 2, "ignore_eos": True, "stop_token_ids": (9,), "stop": ("end",), "logprobs": 2, "prompt_logprobs": 1, "echo": True,
    "skip_special_tokens": False,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "add_special_tokens": False, "add_generation_prompt": True, "continue_final_message": False, "template_kwargs": {"k": "v"},
    "truncate": 9,
}  # fmt: skip
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": ({"type": "text", "text": "Hello"},)})
ADAPTERS = (*[None] * 24, "shout", {"name": "shout"}, {"merge": ("shout", "list"), "weights": (1.0, -2.0)}, {"merge": ()}, {"name": 5}, "")
NUMBERS = (0, 1, -1, 127, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1, 2**64 - 1, -(2**63))
FLOATS = (0.0, -0.0, -1.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "r1", "\x00", "é" * 40, "x" * 300, "\u202e<|endoftext|>", "user", "prompt", "seed")
KEYS = (*PARAMS, *OPTIONS, "role", "content", "received", "model", "prompt", "words", "tenant", "")


class Mutator:
    """Draws from `random.Random(seed)`. `resolved` is what `Accepted` returned for a request, to be resumed."""

    def __init__(self, seed: int, resolved: dict[str, Any]) -> None:
        self.draw = random.Random(seed)
        self._resolved = resolved

    def frame(self) -> bytes:
        """One message, most likely not valid."""
        draw = self.draw
        if draw.random() < 0.6:
            return self._change_fields(self.valid())
        return self._change_bytes(TO_GATEWAY.encode(self.valid()))

    def valid(self) -> Any:
        draw = self.draw
        name = f"r{draw.randrange(40)}"
        kind = draw.choices((Hello, Generate, Cancel, Renew, List, Status, Control, Goodbye), (4, 70, 8, 6, 4, 4, 2, 2))[0]
        if kind is Generate:
            return self._generate(name)
        values = {Hello: (f"c{draw.randrange(9)}", "n"), Cancel: ((name, "r1"),), Renew: (draw.randrange(99),), List: (1,), Status: (2,),
                  Control: (3, "restart", "executor", 0)}  # fmt: skip
        return kind(*values.get(kind, ()))

    def _generate(self, name: str) -> Generate:
        draw = self.draw
        params = {key: PARAMS[key] for key in draw.sample(list(PARAMS), draw.randrange(6))} | {"max_tokens": 12}
        options = {key: OPTIONS[key] for key in draw.sample(list(OPTIONS), draw.randrange(3))}
        given: dict[str, Any] = {"prompt": None, "messages": None, "ids": None, "resume": None}
        given |= draw.choice(
            (
                {"prompt": "Once upon a time"}, {"messages": CHAT}, {"ids": array("i", range(2, 30)).tobytes()},
                {"resume": {**self._resolved, "received": (b"",)}},
            )
        )  # fmt: skip
        limit = draw.choice((None, 0.5, 30))
        return Generate(
            name, given["prompt"], given["messages"], given["ids"], params, options, draw.choice(ADAPTERS), draw.randint(-10, 10), "t",
            limit, limit, given["resume"], draw.choice((None, None, "token")),
        )  # fmt: skip

    # ── fields ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _change_fields(self, message: Any) -> bytes:
        body = msgpack.unpackb(TO_GATEWAY.encode(message))
        for _ in range(self.draw.choice((1, 1, 1, 2, 4))):
            self._change(body)
        try:
            return bytes(msgpack.packb(body))
        except (ValueError, TypeError, OverflowError):  # msgpack itself cannot say this
            return bytes(msgpack.packb(None))

    def _change(self, body: list[Any]) -> None:
        """Walk to a random place and change it: deep places as likely as shallow ones."""
        draw = self.draw
        places: list[tuple[Any, Any]] = []
        todo: list[Any] = [body]
        while todo:
            at = todo.pop()
            keys = range(len(at)) if isinstance(at, list) else list(at)
            places += [(at, key) for key in keys]
            todo += [at[key] for key in keys if isinstance(at[key], list | dict)]
        if not places:
            return
        if draw.random() < 0.7:  # the outermost fields have one type each, so most changes of them end at the codec
            places = [place for place in places if place[0] is not body] or places
        parent, key = draw.choice(places)
        match draw.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.insert(key, self._value())
            case 1:
                parent[draw.choice(KEYS)] = self._value()
            case 2:
                parent[key] = copy.deepcopy(draw.choice(places)[0])
            case 3 if isinstance(parent[key], list | str | bytes):
                parent[key] = parent[key] * draw.choice((2, 3, 40))
            case _:
                parent[key] = self._value()

    def _value(self) -> Any:
        draw = self.draw
        match draw.randrange(10):
            case 0 | 1:
                return draw.choice(NUMBERS)
            case 2:
                return draw.choice(FLOATS)
            case 3 | 4:
                return draw.choice(TEXTS)
            case 5:
                return draw.choice((None, True, False))
            case 6:
                return draw.randbytes(draw.choice((0, 1, 4, 7, 400)))
            case 7:
                return [self._value() for _ in range(draw.choice((0, 1, 3, 30)) if draw.random() < 0.3 else 1)]
            case 8:
                return {draw.choice(KEYS): self._value() for _ in range(draw.randrange(3))}
        nested: Any = []
        for _ in range(draw.choice((3, 9, 14, 200))):
            nested = [nested] if draw.random() < 0.5 else {"k": nested}
        return nested

    # ── bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _change_bytes(self, frame: bytes) -> bytes:
        draw, data = self.draw, bytearray(frame)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(6):
                case 0 if data:
                    data[at % len(data)] ^= 1 << draw.randrange(8)
                case 1 if data:
                    data[at % len(data)] = draw.choice((0x80, 0x90, 0xC0, 0xC1, 0xC6, 0xC9, 0xD9, 0xDD, 0xDF, 0xFF, draw.randrange(256)))
                case 2:
                    del data[at : at + draw.choice((1, 2, 40))]
                case 3:
                    data[at:at] = draw.randbytes(draw.choice((1, 4, 60)))
                case 4:
                    data[at:] = TO_GATEWAY.encode(self.valid())[at:]
                case _:
                    del data[at:]
        return bytes(data)
