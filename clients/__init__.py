"""The client SDK: `AsyncClient`, `Client`, `launch`. Imports neither torch nor the engine; what is not used is not imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.clients.aio import AsyncClient
    from penstock.clients.aio_stream import AsyncStream
    from penstock.clients.errors import PenstockError
    from penstock.clients.launcher import Engine, alaunch, launch
    from penstock.clients.link import Keys
    from penstock.clients.sync import Client
    from penstock.clients.sync_stream import Stream
    from penstock.clients.values import Chunk, Completion, Outcome, Sample, TokenLogprob, Usage
    from penstock.engine.params import PromptOptions, SamplingParams

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "Completion",
    "Engine",
    "Keys",
    "Outcome",
    "PenstockError",
    "PromptOptions",
    "Sample",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
    "Usage",
    "alaunch",
    "launch",
]

# The blocking client does without asyncio, and the asynchronous one without threads: each import costs what it uses.
_HOMES = {
    "penstock.engine.params": ("PromptOptions", "SamplingParams"),
    "penstock.clients.aio": ("AsyncClient",),
    "penstock.clients.aio_stream": ("AsyncStream",),
    "penstock.clients.errors": ("PenstockError",),
    "penstock.clients.launcher": ("Engine", "alaunch", "launch"),
    "penstock.clients.link": ("Keys",),
    "penstock.clients.sync": ("Client",),
    "penstock.clients.sync_stream": ("Stream",),
    "penstock.clients.values": ("Chunk", "Completion", "Outcome", "Sample", "TokenLogprob", "Usage"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
