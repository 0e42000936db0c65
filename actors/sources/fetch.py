"""From a source to a folder on this machine. Everything here blocks: it is called in threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from penstock.actors.sources import archive, hub, local, s3
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Kind, Source
from penstock.actors.sources.transfer import NEEDED, Fetched, Limits, Settings

__all__ = ["Fetched", "Limits", "Settings", "SourceError", "fetch", "probe"]

_FETCH: dict[Kind, Callable[[Source, Path, str | None, Limits, Settings], Fetched]] = {
    "local": local.fetch, "hub": hub.fetch, "s3": s3.fetch, "url": archive.fetch,
}  # fmt: skip
_PROBE: dict[Kind, Callable[[Source, str | None, Limits, Settings], str]] = {
    "local": local.probe, "hub": hub.probe, "s3": s3.probe, "url": archive.probe,
}  # fmt: skip


def fetch(source: Source, into: Path, token: str | None, limits: Limits, settings: Settings) -> Fetched:
    """Put `adapter_config.json` and `adapter_model.safetensors`, and nothing else, into a folder that is there and empty. After an error
    it is empty again.

    `token`: a hub's or a server's bearer token, for S3 `ACCESS:SECRET` or `ACCESS:SECRET:SESSION`; folders need none. Without one, a hub
    and a server are asked anonymously, whatever login is configured on this machine, and S3 as AWS's own configuration says.

    Raises `SourceError`."""
    _check(source, token, settings)
    try:
        return _FETCH[source.kind](source, into, token, limits, settings)
    except BaseException:
        for name in (*NEEDED, archive.ARCHIVE):
            (into / name).unlink(missing_ok=True)
        raise


def probe(source: Source, token: str | None, limits: Limits, settings: Settings) -> str:
    """The revision that `fetch` would find now, without the files, and whether this token may have them: a token is checked each time it
    is used, or whoever knows the name of a private adapter could use what another one's token fetched. Raises `SourceError`."""
    _check(source, token, settings)
    return _PROBE[source.kind](source, token, limits, settings)


def _check(source: Source, token: str | None, settings: Settings) -> None:
    if not settings.allowed.allows(source):
        raise SourceError("not_listed", f"{source.shown} is not among the sources that the operator of this engine allows")
    # In a header it could end the line and begin another, and libraries show what they refuse.
    if token is not None and not re.fullmatch(r"[\x21-\x7e]{1,8192}", token):
        raise SourceError("not_allowed", "a token must be 1 to 8192 printable ASCII characters without spaces")
