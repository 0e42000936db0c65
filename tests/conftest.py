"""For all tests."""

import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Machines are shared: how long a draw takes says nothing about what is tested.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
# A shell ignores it for what runs in the background, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose sums are taken in one order. Triton's interpreter makes `dot` of numpy's, which on some processors gives a row other
    bits at another place."""

    def multiply(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
        for k in range(a.shape[-1]):
            total += a[..., k : k + 1].astype(dtype) * b[..., k : k + 1, :].astype(dtype)
        return total

    monkeypatch.setattr(np, "matmul", multiply)
