"""Adapters in a bucket of S3, or of what speaks its protocol."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Source
from penstock.actors.sources.transfer import CHUNK, NEEDED, Deadline, Fetched, Limits, Settings, missing, save

ATTEMPTS = 2  # S3 answers 503 now and then by design
# Credentials of a session that is over, or never was, are refused with a status of 400. To a HEAD that is all that is said.
_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "400"}
_AT_ONCE = 0.001  # seconds


def fetch(source: Source, into: Path, token: str | None, limits: Limits, settings: Settings) -> Fetched:
    deadline = Deadline.of(limits, source.shown)
    marks, total = [], 0
    with closing(_client(source, token, deadline, settings)) as client:
        for name in NEEDED:
            with _failing(source.shown, name):
                answer = client.get_object(Bucket=source.place, Key=_key(source, name))
            with closing(answer["Body"]) as body:
                marks.append(_mark(answer, source.shown, name))
                chunks = _chunks(body, source.shown, name, deadline)
                total += save(chunks, into, name, limits.of_file(name), deadline, answer.get("ContentLength"))
    return Fetched(" ".join(marks), total)


def probe(source: Source, token: str | None, limits: Limits, settings: Settings) -> str:
    """Asking for an object's header takes the same permission as reading it."""
    deadline = Deadline.of(limits, source.shown)
    marks = []
    with closing(_client(source, token, deadline, settings)) as client:
        for name in NEEDED:
            deadline.left()
            with _failing(source.shown, name):
                answer = client.head_object(Bucket=source.place, Key=_key(source, name))
            marks.append(_mark(answer, source.shown, name))
    return " ".join(marks)


def _key(source: Source, name: str) -> str:
    return f"{source.path}/{name}" if source.path else name


def _mark(answer: Mapping[str, Any], shown: str, name: str) -> str:
    if "ETag" not in answer:
        raise SourceError("unreachable", f"{shown}: {name}: what answers is no S3: it names no ETag")
    return f"{answer['ETag']}@{answer.get('VersionId', 'null')}"


def _client(source: Source, token: str | None, deadline: Deadline, settings: Settings) -> Any:
    with _failing(source.shown, NEEDED[0]):
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.session import Session  # type: ignore[import-untyped]

        session = Session()
        session.register_component("data_loader", _descriptions())
        if token is not None:
            session.set_credentials(*_credentials(token, source.shown))
        return session.create_client(
            "s3",
            region_name=session.get_config_variable("region") or "us-east-1",  # one must be signed for; AWS tells where a bucket really is
            endpoint_url=settings.s3_endpoint,
            config=Config(
                connect_timeout=deadline.connect(),
                read_timeout=deadline.read(),
                retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
                # Other servers seldom have a name for each bucket.
                s3=None if settings.s3_endpoint is None else {"addressing_style": "path"},
                user_agent_extra="penstock",
            ),
        )


@functools.cache
def _descriptions() -> Any:
    """The files that describe AWS's services to botocore: reading them takes most of the time that a client takes to be made. Nothing of
    any request is in it."""
    from botocore.loaders import create_loader  # type: ignore[import-untyped]

    return create_loader()


def _credentials(token: str, shown: str) -> list[str]:
    parts = token.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise SourceError("not_allowed", f"{shown}: a token for S3 must be ACCESS:SECRET or ACCESS:SECRET:SESSION")
    return parts


def _chunks(body: Any, shown: str, name: str, deadline: Deadline) -> Iterator[bytes]:
    # Each byte may take as long as a read may, and a chunk waits for all of its own: at the deadline there is no more waiting.
    end = threading.Timer(deadline.left(), body.set_socket_timeout, (_AT_ONCE,))
    end.daemon = True
    end.start()
    try:
        while True:
            with _failing(shown, name):
                chunk = body.read(CHUNK)
            if not chunk:
                return
            yield chunk
    finally:
        end.cancel()


@contextmanager
def _failing(shown: str, name: str) -> Iterator[None]:
    """Turn what the library raises into a `SourceError`. Nothing is chained: its errors quote requests."""
    try:
        from botocore.exceptions import (  # type: ignore[import-untyped]
            BotoCoreError,
            ClientError,
            ConnectTimeoutError,
            NoCredentialsError,
            PartialCredentialsError,
            ReadTimeoutError,
        )
    except ImportError:
        raise SourceError("not_installed", f"{shown}: S3 needs the package botocore: pip install penstock[s3]") from None
    try:
        yield
    except ClientError as error:
        raise _refused(error.response, shown, name) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise SourceError("not_allowed", f"{shown}: there is no token, and AWS's own configuration has no credentials") from None
    except (ConnectTimeoutError, ReadTimeoutError):
        raise SourceError("timed_out", f"{shown}: {name}: S3 does not answer in time") from None
    except (BotoCoreError, OSError, ValueError) as error:
        raise SourceError("unreachable", f"{shown}: {name}: S3 is not reachable: {type(error).__name__}") from None


def _refused(response: Mapping[str, Any], shown: str, name: str) -> SourceError:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(response.get("Error", {}).get("Code", ""))[:64]
    if status in (401, 403) or code in _EXPIRED:
        return SourceError("not_allowed", f"{shown}: {name} is not for these credentials ({code})")
    if code == "NoSuchBucket":
        return SourceError("not_found", f"{shown}: there is no such bucket")
    if status == 404:
        return missing(shown, name)
    return SourceError("unreachable", f"{shown}: {name}: S3 answers with HTTP {status} ({code})", retry=status == 429 or status >= 500)
