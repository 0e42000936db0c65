"""`penstock replay`: run what a scheduler recorded, and see whether it decides the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from penstock.actors.wire import Limits, WireError, check_budget
from penstock.clients.cli.report import reported, stdout
from penstock.clients.errors import InvalidRequest, PenstockError

if TYPE_CHECKING:
    from penstock.engine.replay import Replayed  # the command line starts without the engine

LIMITS = Limits(bytes=2**30, elements=2**25, depth=32)


def replay(
    file: Annotated[Path, typer.Argument(help="a recording, from a scheduler that crashed or was asked for one", show_default=False)],
) -> None:
    """Run the scheduler over a recording of its inputs, with no model and no GPU, and compare each plan with the recorded one. An engine
    writes a recording when its scheduler crashes, and when `penstock serve` gets SIGUSR1; its log says where."""
    with reported():
        told, text = _replay(file)
        if told.difference is not None:
            raise PenstockError(f"after {told.steps} equal steps, call {told.calls} of the recording: {told.difference}", code="difference")
        console = stdout()
        console.print(f"{told.steps} steps in {told.calls} calls: every plan is the recorded one" + ("" if text else ", ids aside"))
        if told.raised is not None:
            console.print(f"the scheduler raised, as it did when it was recorded: {escape(told.raised)}")


def _replay(file: Path) -> tuple[Replayed, bool]:
    """What came of it, and whether ids were compared too."""
    try:
        from penstock.engine.recording import RecordingError, decode
        from penstock.engine.replay import replay as run
    except ImportError as error:
        raise InvalidRequest(f"a replay needs the engine: pip install penstock[engine] ({error})") from error
    try:
        with file.open("rb") as opened:
            data = opened.read(LIMITS.bytes + 1)  # one too many is told, however many there are
        check_budget(data, LIMITS)
        recording = decode(data)
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}", field="file", value=str(file)) from error
    except (WireError, RecordingError) as error:
        raise InvalidRequest(f"{file}: {error}", field="file", value=str(file)) from error
    except MemoryError as error:
        raise InvalidRequest(f"{file} takes more memory than there is", field="file", value=str(file)) from error
    return run(recording), recording.text
