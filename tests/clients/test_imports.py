"""The client is light: programs that only talk to an engine pay for nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "structlog", "tokenizers", "safetensors", "typer", "rich"}
PROGRAM = """
import sys, time, json
begun = time.process_time()
{statement}
seconds = time.process_time() - begun
print(json.dumps([seconds, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Byte code is kept, as it is wherever the package is installed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("pycache"))}


def imported(statement: str, environment: dict[str, str]) -> tuple[float, set[str]]:
    """Seconds of the processor, since other programs run on this machine too; and the packages that were imported."""
    program = PROGRAM.format(statement=statement)
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    seconds, names = json.loads(out)
    return seconds, set(names)


@pytest.mark.parametrize(
    "names", ["AsyncClient", "Client", "launch, alaunch", "AsyncClient, Client, launch, PenstockError, SamplingParams"]
)
def test_the_sdk_imports_nothing_heavy_and_in_under_200_ms(names: str, compiled: dict[str, str]) -> None:
    runs = [imported(f"from penstock.clients import {names}", compiled) for _ in range(6)]
    assert not runs[0][1] & HEAVY
    assert min(seconds for seconds, _ in runs) < 0.2


def test_the_command_line_starts_without_torch(compiled: dict[str, str]) -> None:
    assert not imported("import penstock.clients.cli.main", compiled)[1] & (HEAVY - {"typer", "rich"})


def test_every_public_name_is_there_and_no_other(compiled: dict[str, str]) -> None:
    statement = "import penstock.clients as c; [getattr(c, name) for name in c.__all__]\ntry: c.nobody\nexcept AttributeError: pass"
    imported(statement, compiled)
    # The function, whatever was imported first: a module of the same name would hide it.
    imported("import penstock.clients.launcher; from penstock.clients import launch; assert callable(launch)", compiled)
