"""Any actor may be killed at any moment: every stream completes, and equals the one that nobody disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

COMMAND = (sys.executable, "-m", "penstock.clients.cli.main", "bench", "chaos", "--json")


def bench(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-4000:]
    print(done.stdout)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("kills", "streams", "arguments"),
    [(200, 200, ("--seed", "1")), (20, 12, ("--model", "tiny", "--streams", "12"))],
    ids=["mock", "tiny"],
)
def test_every_stream_equals_its_undisturbed_run_whoever_is_killed(kills: int, streams: int, arguments: tuple[str, ...]) -> None:
    figures = bench("--kills", str(kills), *arguments)
    assert figures["kills"] >= kills
    assert all(figures["killed"].values())
    assert (figures["lost"], figures["repeated"], figures["diverged"]) == (0, 0, 0), figures["odd"]
    assert figures["ties"] <= figures["streams"] / 1000 + 1
    assert figures["streams"] >= streams
    assert figures["strange_deaths"] == []
    assert (figures["open"], figures["blocks_held"]) == (0, 0)
