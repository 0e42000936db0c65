"""Logs: one JSON line an event, with the actor's name and incarnation bound."""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol, TextIO

import structlog


class Log(Protocol):
    """What actors use of a structlog logger."""

    def debug(self, event: str, **values: Any) -> Any: ...
    def info(self, event: str, **values: Any) -> Any: ...
    def warning(self, event: str, **values: Any) -> Any: ...
    def error(self, event: str, **values: Any) -> Any: ...
    def exception(self, event: str, **values: Any) -> Any: ...


def open_log(level: str, path: str | None, **bound: Any) -> Log:
    """A logger of its own for each actor, writing whole lines, so that several processes can share a file."""
    stream: TextIO = sys.stderr if path is None else open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  open as long as the actor
    logger: Log = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    ).bind(**bound)
    return logger
