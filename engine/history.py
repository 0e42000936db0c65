"""What the sampler must remember of a slot's tokens, kept on the device so that a step never waits for the ids of the step before it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.engine.plan import Int32

IN_PROMPT = 1 << 30  # added to a token's count if the prompt holds it
TAIL = 512  # most recent tokens that a bad word is compared with


class Lines:
    """Device memory for those slots that need it: a line each, allocated when first asked for, and doubled when they run out."""

    def __init__(self, slots: int, width: int, empty: int, device: torch.device) -> None:
        self.line_of = np.full(slots, -1, np.int32)
        self._free: list[int] = []
        self._empty = empty
        self.data = torch.empty((0, width), dtype=torch.int32, device=device)

    def put(self, slot: int, values: Int32) -> None:
        """Set a slot's line, int32 `[width]`."""
        line = int(self.line_of[slot])
        if line < 0:
            if not self._free:
                self._grow()
            line = self._free.pop()
            self.line_of[slot] = line
        self.data[line].copy_(torch.from_numpy(values))

    def drop(self, slot: int) -> None:
        """The slot needs no line any more."""
        line = int(self.line_of[slot])
        if line >= 0:
            self._free.append(line)
            self.line_of[slot] = -1

    def _grow(self) -> None:
        have = len(self.data)
        more = min(max(4, have), len(self.line_of) - have)
        self.data = torch.cat((self.data, self.data.new_full((more, self.data.shape[1]), self._empty)))
        self._free = list(range(have + more - 1, have - 1, -1))


class TokenCounts(Lines):
    """How often each token was generated, and whether the prompt holds it: for penalties. `[lines, vocab_size]`."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        super().__init__(slots, vocab_size, 0, device)

    def fill(self, slot: int, prompt: Int32, generated: Int32) -> None:
        width = self.data.shape[1]
        counts = np.bincount(generated, minlength=width).astype(np.int32)
        counts[prompt] += np.int32(IN_PROMPT)
        self.put(slot, counts)

    def add(self, lines: Tensor, ids: Tensor) -> None:
        """Each line gains one token; int64 `[n]` both, no line twice."""
        self.data.view(-1).index_add_(0, lines * self.data.shape[1] + ids, torch.ones_like(ids, dtype=torch.int32))


class Tails(Lines):
    """Each slot's last `TAIL` tokens, the newest at the end, -2 where there were none: for bad words of several tokens."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, TAIL, -2, device)

    def fill(self, slot: int, history: Int32) -> None:
        tail = np.full(TAIL, -2, np.int32)
        recent = history[-TAIL:]
        tail[TAIL - len(recent) :] = recent
        self.put(slot, tail)

    def add(self, lines: Tensor, ids: Tensor) -> None:
        """Each line gains one token; int64 `[n]` both, no line twice."""
        self.data.index_copy_(0, lines, torch.cat((self.data[lines][:, 1:], ids[:, None].int()), dim=1))
