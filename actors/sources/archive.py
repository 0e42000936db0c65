"""Adapters in an archive that a web server has."""

from __future__ import annotations

from base64 import b64encode
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import unquote

from penstock.actors.sources import web
from penstock.actors.sources.source import Source
from penstock.actors.sources.transfer import Deadline, Fetched, Limits, Settings, save
from penstock.actors.sources.unpack import unpack

ARCHIVE = "archive.part"  # what it is called until it is unpacked


def fetch(source: Source, into: Path, token: str | None, limits: Limits, settings: Settings) -> Fetched:
    deadline = Deadline.of(limits, source.shown)
    with web.opened(source, source.shown, deadline, _authorization(source, token), settings.allowed.allows) as answer:
        revision = _revision(answer)
        save(web.chunks(answer, source.shown), into, ARCHIVE, limits.file_bytes, deadline, web.declared(answer))
    total = unpack(into / ARCHIVE, into, limits, deadline)
    (into / ARCHIVE).unlink()
    return Fetched(revision, total)


def probe(source: Source, token: str | None, limits: Limits, settings: Settings) -> str:
    """By a GET of one byte: a signed URL is for one method alone. From a server that sends all, no more than the header is read."""
    deadline = Deadline.of(limits, source.shown)
    authorization = _authorization(source, token)
    with web.opened(source, source.shown, deadline, authorization, settings.allowed.allows, Range="bytes=0-0") as answer:
        return _revision(answer)


def _authorization(source: Source, token: str | None) -> str | None:
    if token is not None:
        return f"Bearer {token}"
    return f"Basic {b64encode(unquote(source.login).encode()).decode()}" if source.login else None


def _revision(answer: HTTPResponse) -> str:
    etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    return f"etag {etag}" if etag else f"modified {modified}" if modified else ""
