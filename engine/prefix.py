"""Cached prefixes: which blocks a stream need not compute, and which of its own it offers to others."""

from __future__ import annotations

import numpy as np

from penstock.engine.blocks import BlockPool
from penstock.engine.plan import Int32
from penstock.engine.slots import Slots
from penstock.engine.stream import Stream

AHEAD = 32  # blocks: a long prompt is not digested much further than it is found


class Prefixes:
    """The prefix index of a pool, as the streams of some slots use it. Switched off, it finds and offers nothing."""

    def __init__(self, pool: BlockPool, slots: Slots, *, enabled: bool) -> None:
        self._pool, self._slots, self._size = pool, slots, slots.block_size
        self.enabled = enabled

    def match(self, stream: Stream) -> list[int]:
        """Blocks that hold the longest cached prefix. The last known token is always computed: its logits are wanted."""
        hits: list[int] = []
        if not self.enabled or stream.tells_prompt:
            return hits
        full = (len(stream.tokens) - 1) // self._size
        while len(hits) < full:
            ahead = min(len(hits) + AHEAD, full)
            for digest in stream.chain(ahead, stream.tokens, self._size)[len(hits) : ahead]:
                block = self._pool.lookup(digest)
                if block is None:
                    return hits
                hits.append(block)
        return hits

    def offer(self, stream: Stream, tokens: int) -> None:
        """Others may find the full blocks among the first `tokens` tokens of this running stream."""
        first, last = int(self._slots.published[stream.slot]), tokens // self._size
        if self.enabled and first < last:
            digests = stream.chain(last, self._slots.known_tokens(stream), self._size)
            for block, digest in zip(stream.blocks[first:last], digests[first:last], strict=True):
                self._pool.publish(block, digest)
            self._slots.published[stream.slot] = last

    def offer_known(self, stream: Stream) -> None:
        """The blocks of which all tokens are known and all keys computed."""
        self.offer(stream, int(self._slots.certain(stream.slot)))

    def offer_generated(self, slots: Int32) -> None:
        """The same for blocks that became full in a step. Streams that started together fill their blocks together; so a step offers a
        few of them, twice the average, and the steps after it the others."""
        if not self.enabled:
            return
        certain = self._slots.certain(slots)
        full = np.flatnonzero(certain // self._size > self._slots.published[slots])[: 2 * self._slots.size // self._size + 1]
        for stream, tokens in zip(self._slots.at(slots[full]), certain[full].tolist(), strict=True):
            self.offer(stream, tokens)
