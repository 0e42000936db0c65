"""Reading over HTTP, within limits. On the standard library: what huggingface_hub brings along is another client in each of its versions,
and none has an end for a whole transfer, as a server that sends a byte now and then makes it last."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.source import Source, parse_url
from penstock.actors.sources.transfer import CHUNK, Deadline

MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429)  # these, and all from 500 on, say that another time may be better


@contextmanager
def opened(
    source: Source, shown: str, deadline: Deadline, authorization: str | None, allows: Callable[[Source], bool], **headers: str
) -> Iterator[HTTPResponse]:
    """The answer to a GET, its body yet to be read. Redirects are followed to where `allows` says so. `authorization` goes to the origin
    that it is meant for: the first redirect to another one drops it. `shown` stands for the source in errors. Raises `SourceError`."""
    with closing(_answer(source, shown, deadline, authorization, allows, headers)) as answer:
        yield answer


def chunks(answer: HTTPResponse, shown: str) -> Iterator[bytes]:
    """The body. Raises `SourceError`, also if it ends before it is whole."""
    expected, got = declared(answer), 0
    while True:
        with _failing(shown):
            chunk = answer.read(CHUNK)
        if not chunk:
            break
        got += len(chunk)
        yield chunk
    if expected is not None and got < expected:
        raise SourceError("unreachable", f"{shown}: the connection ended after {got} of {expected} bytes")


def declared(answer: HTTPResponse) -> int | None:
    """The bytes that the body will have, if the server says so."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and len(length) < 20 and "Transfer-Encoding" not in answer.headers else None


def _answer(
    source: Source, shown: str, deadline: Deadline, authorization: str | None, allows: Callable[[Source], bool], headers: Mapping[str, str]
) -> HTTPResponse:
    opener = OpenerDirector()
    for handler in (ProxyHandler(), _Http(deadline), _Https(deadline), HTTPErrorProcessor(), HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "penstock")]
    for _ in range(1 + MOST_REDIRECTS):
        request = Request(source.url, headers=dict(headers))
        if authorization is not None:
            request.add_header("Authorization", authorization)
        with _failing(shown):
            try:
                answer: HTTPResponse = opener.open(request, timeout=deadline.connect())
                return answer
            except HTTPError as error:
                error.close()  # unread: it may be endless
                location = error.headers.get("Location")
                if error.code not in _REDIRECTS or location is None:
                    raise
        target = _target(source, location, shown)
        if not allows(target):
            raise SourceError("not_listed", f"{shown} redirects to {target.place}, which the operator of this engine does not allow")
        if target.place != source.place:
            authorization = None
        source = target
    raise SourceError("unreachable", f"{shown} redirects more than {MOST_REDIRECTS} times", retry=False)


def _target(source: Source, location: str, shown: str) -> Source:
    # A header's bytes come as Latin-1.
    encoded = quote(location.encode("latin-1", "replace"), safe="!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    try:
        target = parse_url(urljoin(source.url, encoded))
    except (SourceError, ValueError):
        raise SourceError("unreachable", f"{shown} redirects to what is no URL", retry=False) from None
    if target.login:
        raise SourceError("unreachable", f"{shown} redirects to {target.place} with a login in the URL", retry=False)
    return target


@contextmanager
def _failing(shown: str) -> Iterator[None]:
    """Turn what the standard library raises into a `SourceError`. Nothing is chained: such errors quote URLs, secrets included, and a log
    shows what an error came from."""
    try:
        yield
    except HTTPError as error:
        raise refused(error.code, shown) from None
    except TimeoutError:
        raise _late(shown) from None
    except URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _late(shown) from None
        raise SourceError("unreachable", f"{shown} is not reachable: {_why(error.reason)}") from None
    except (OSError, HTTPException, ValueError) as error:  # the last for headers and chunks that are no numbers
        raise SourceError("unreachable", f"{shown} does not answer as it should: {_why(error)}") from None


def refused(status: int, shown: str) -> SourceError:
    """What a status of 400 or more means."""
    if status in (401, 403, 407):
        return SourceError("not_allowed", f"{shown} is not for this token, or for nobody without one (HTTP {status})")
    if status in (404, 410):
        return SourceError("not_found", f"{shown} is not there, or not for this token (HTTP {status})")
    return SourceError("unreachable", f"{shown} answers with HTTP {status}", retry=status in _LATER or status >= 500)


def _late(shown: str) -> SourceError:
    return SourceError("timed_out", f"{shown} does not answer in time")


def _why(reason: object) -> str:
    return reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else type(reason).__name__


class _Timed(io.RawIOBase):
    """What a socket receives, each time with as long a wait as the deadline leaves."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket, deadline: Deadline) -> None:
        self._raw = raw
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(self._deadline.read())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(HTTPResponse):
    def __init__(self, deadline: Deadline, connection: socket.socket, *more: Any, **named: Any) -> None:
        super().__init__(connection, *more, **named)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), connection, deadline))  # from the first line on


class _Plain(HTTPConnection):
    def __init__(self, deadline: Deadline, host: str, **named: Any) -> None:
        super().__init__(host, **named)
        self.response_class = partial(_Answer, deadline)  # type: ignore[assignment]


class _Secure(HTTPSConnection):
    def __init__(self, deadline: Deadline, host: str, **named: Any) -> None:
        super().__init__(host, **named)
        self.response_class = partial(_Answer, deadline)  # type: ignore[assignment]


class _Http(HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_Plain, self._deadline), request)


class _Https(HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_Secure, self._deadline), request)
