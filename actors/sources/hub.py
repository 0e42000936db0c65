"""Adapters of a hub of models.

huggingface_hub is asked where a file is, at which commit, and whether the token may have it. The bytes are read by `web`: the library's
own download waits and retries by constants of its process, so that a deadline could not be kept, and logs where it was redirected to, which
is a signed URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.actors.sources import web
from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Source, parse_url
from penstock.actors.sources.transfer import NEEDED, WEIGHTS, Deadline, Fetched, Limits, Settings, missing, save, too_large


def fetch(source: Source, into: Path, token: str | None, limits: Limits, settings: Settings) -> Fetched:
    """Both files are of the commit that the revision is at first."""
    deadline = Deadline.of(limits, source.shown)
    commit, size = _look(source, token, deadline, settings)
    if size is not None and size > limits.file_bytes:
        raise too_large(f"{source.shown}: {WEIGHTS}", limits.file_bytes, size)
    total = 0
    for name in NEEDED:
        file = parse_url(_url(source, commit, name, settings))
        shown = f"{source.shown}: {name}"
        authorization = None if token is None else f"Bearer {token}"

        def allows(target: Source, file: Source = file) -> bool:
            """A hub sends us to its stores, wherever they are, but from a connection that proves who it is not to one that does not."""
            return target.place.startswith("https://") or file.place.startswith("http://")

        with web.opened(file, shown, deadline, authorization, allows) as answer:
            total += save(web.chunks(answer, shown), into, name, limits.of_file(name), deadline, web.declared(answer))
    return Fetched(commit, total)


def probe(source: Source, token: str | None, limits: Limits, settings: Settings) -> str:
    return _look(source, token, Deadline.of(limits, source.shown), settings)[0]


def _look(source: Source, token: str | None, deadline: Deadline, settings: Settings) -> tuple[str, int | None]:
    """The commit that the revision is at, and the bytes of the weights. The weights themselves are asked for: what is known of a
    repository is told to those, too, who may not have its files. Raises `SourceError`."""
    with _failing(source.shown):
        from huggingface_hub import get_hf_file_metadata

        # `False`: not even the token that this machine is logged in with.
        url = _url(source, source.path, WEIGHTS, settings)
        found = get_hf_file_metadata(url, token=token or False, timeout=deadline.read(), endpoint=settings.hub_endpoint)
    if found.commit_hash is None or not re.fullmatch(r"[0-9A-Za-z]{4,128}", found.commit_hash):
        raise SourceError("unreachable", f"{source.shown}: the hub does not say which commit it is", retry=False)
    return found.commit_hash, found.size


def _url(source: Source, revision: str, name: str, settings: Settings) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(source.place, name, revision=revision, endpoint=settings.hub_endpoint)


@contextmanager
def _failing(shown: str) -> Iterator[None]:
    """Turn what the library raises into a `SourceError`. Nothing is chained: its errors hold the requests, and those the token."""
    try:
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            HTTPError,  # of the client that it is built on, whichever that is
            OfflineModeIsEnabled,
            RemoteEntryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise SourceError("not_installed", f"{shown}: the hub needs the package huggingface_hub: pip install penstock[engine]") from None
    try:
        yield
    except GatedRepoError:
        raise SourceError("not_allowed", f"{shown} is gated, and its owner has not let this token in") from None
    except RevisionNotFoundError:
        raise SourceError("not_found", f"{shown}: there is no such revision") from None
    except RemoteEntryNotFoundError:
        raise missing(shown, WEIGHTS) from None
    except HfHubHTTPError as error:
        raise web.refused(error.response.status_code, shown) from None
    except OfflineModeIsEnabled:
        raise SourceError("unreachable", f"{shown}: huggingface_hub is told to be offline (HF_HUB_OFFLINE)", retry=False) from None
    except HFValidationError:
        raise SourceError("invalid", f"{shown} cannot be the id of a repository") from None
    except (HTTPError, OSError) as error:
        if _timed_out(error):
            raise SourceError("timed_out", f"{shown}: the hub does not answer in time") from None
        raise SourceError("unreachable", f"{shown}: the hub is not reachable: {type(error).__name__}") from None


def _timed_out(error: Any) -> bool:
    """Whether it began with a socket's timeout, which each layer above it names anew."""
    while error is not None and not isinstance(error, TimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None
