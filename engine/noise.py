"""Gumbel noise from a counter: a hash of (seed, absolute position of the token, token id), so there is no generator state to keep or lose.

The hash is splitmix64 (Steele et al., OOPSLA 2014), exact in 64-bit integers on any device. Its top 52 bits h give u = (h + 1/2) / 2^52,
which is exact in float64 and never 0 or 1; the noise is -log(-log(u)), rounded to float32 because the last bit of a float64 `log` differs
between devices. The token is then `argmax(logits / temperature + noise)` (Gumbel 1954; Maddison et al., arXiv:1411.0030).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
CHUNK = 1 << 16  # scores drawn at once on a CPU: their hashes stay in the cache


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def noise_keys(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """The key of each row's noise. `seeds` int64 `[n]`, `positions` `[n]` of the tokens to be drawn; returns int64 `[n]`."""
    mixed = _mix(seeds.astype(np.uint64) + np.uint64(GOLDEN))
    return _mix(mixed + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)).astype(np.int64)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """int64 `x`, taken as unsigned, shifted right."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def id_steps(vocab_size: int, device: torch.device) -> Tensor:
    """What each token id adds to a key: int64 `[vocab_size]`."""
    return (torch.arange(1, vocab_size + 1, device=device)) * _signed(GOLDEN)


def gumbel(keys: Tensor, steps: Tensor) -> Tensor:
    """Noise for each key and token id: `keys` int64 `[n]`, `steps` of `id_steps`; returns float32 `[n, vocab_size]`."""
    x = keys[:, None] + steps
    x.bitwise_xor_(_logical_shift(x, 30)).mul_(_signed(MIX_1))
    x.bitwise_xor_(_logical_shift(x, 27)).mul_(_signed(MIX_2))
    x.bitwise_xor_(_logical_shift(x, 31))
    u = _logical_shift(x, 12).double().add_(0.5).mul_(2.0**-52)
    return u.log_().neg_().log_().neg_().float()


def draw(scaled: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """Draw a token for each row of `scaled`, float32 logits over temperature `[n, vocab_size]`, -inf where a token is excluded; it is
    overwritten. Returns int64 `[n]`."""
    rows = max(1, CHUNK // scaled.shape[1]) if scaled.device.type == "cpu" else len(scaled)
    for low in range(0, len(scaled), rows):
        scaled[low : low + rows] += gumbel(keys[low : low + rows], steps)
    return scaled.argmax(dim=-1)
