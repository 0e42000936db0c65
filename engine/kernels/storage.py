"""Keys and values as the pool keeps them: see `engine.attention.storage`."""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.engine.attention import storage

LARGEST = tl.constexpr(storage.LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x in the pool's dtype. In e4m3 what is too large becomes the largest there is; only NaN is NaN."""
    if DTYPE == tl.float8e4nv:  # noqa: SIM300
        x = tl.clamp(x.to(tl.float32), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)
