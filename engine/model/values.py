"""A family's config as plain values, so that one process can read it for another. transformers' config classes take seconds to import where
torch is there, and a tenth of that where it is not to be found."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.engine.model.spec import NATIVE, read_family

ROTARIES = ("default", "linear", "llama3")  # whose frequencies need nothing of transformers' own code
DIGEST = "digest of config.json"


def read_values(folder: Path) -> dict[str, Any] | None:
    """What transformers makes of config.json, with the family's defaults, under all names that it goes by; None if the native decoder needs
    more than that. Imports transformers. Raises `ModelError` (broken_config), and `OSError`."""
    digest = digest_of(folder)
    config = read_family(folder, "broken_config", str(folder / "config.json"))
    values = config.to_dict() | {alias: getattr(config, alias) for alias in config.attribute_map}
    rope = values.get("rope_parameters") or {}
    kinds = {entry.get("rope_type", "default") for entry in (rope, *rope.values()) if isinstance(entry, Mapping)}
    return values | {DIGEST: digest} if config.model_type in NATIVE and kinds <= set(ROTARIES) else None


def still_holds(values: Mapping[str, Any], folder: Path) -> bool:
    """Whether config.json is what it was when they were read."""
    return values.get(DIGEST) == digest_of(folder)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
