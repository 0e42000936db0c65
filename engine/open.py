"""From settings to a runner that is ready for plans, and the facts that others need to know of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.engine.mock import MockRunner

TINY = Path(__file__).with_name("tiny")


def model_folder(model: str) -> str:
    """Where a model is: `tiny` is in the package; anything else is a folder or a hub id already."""
    return str(TINY) if model == "tiny" else model


def open_mock(*, model: str, max_running: int, block_size: int, token_budget: int | None, **_: Any) -> tuple[MockRunner, dict[str, Any]]:
    """A mock executor with the vocabulary of `model`, if that has a config.json, and a roomy cache."""
    path = Path(model_folder(model)) / "config.json"
    vocab_size = int(json.loads(path.read_text())["vocab_size"]) if path.is_file() else 32_000
    max_model_len = 32_768
    return MockRunner(vocab_size, first=vocab_size // 4, span=vocab_size // 2), {
        "digest": "mock", "name": "mock", "vocab_size": vocab_size, "max_model_len": max_model_len, "eos": [], "defaults": {},
        "slots": max_running, "blocks": max_running * 4096 // block_size, "block_size": block_size,
        "token_budget": token_budget or 8192, "dtype": "none", "device": "none",
    }  # fmt: skip
