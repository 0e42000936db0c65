"""Tests of Triton kernels: on a GPU if there is one, else under Triton's interpreter.

That must be chosen before anything imports Triton, so a file of such tests then runs itself again in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
READY = GPU or INTERPRETED
here = pytest.mark.skipif(not READY, reason="runs in a process of its own, under the interpreter")
elsewhere = pytest.mark.skipif(READY, reason="the kernels run in this process")


def apart(test: Callable[[], None]) -> Callable[[], None]:
    """For the test of a file that it passes under the interpreter, which takes minutes: `make kernels`."""
    return pytest.mark.apart(pytest.mark.timeout(1800)(elsewhere(test)))


def assert_passes(file: str) -> None:
    """All tests of a file, under the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
