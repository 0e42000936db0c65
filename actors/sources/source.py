"""Where an adapter comes from, as a value, and which places an operator allows."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from penstock.actors.sources.errors import SourceError

Kind = Literal["local", "hub", "s3", "url"]

MAIN = "main"  # the revision of a hub that is meant where none is named
LONGEST = 4096  # characters of a source: a signed URL has some hundreds
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"(?P<repo>(?:{_WORD}/)?{_WORD})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,254}}))?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9_.-]{0,252})|\[[0-9a-f:.]{2,45}\]")
_PORTS = {"http": 80, "https": 443}
_UNREADABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last are halves of characters, which nothing can encode


@dataclass(frozen=True, slots=True)
class Source:
    """A place that was parsed. Equal places are equal values.

    | kind | place | path |
    |---|---|---|
    | local | the folder, absolute | |
    | hub | the repository's id, `org/name` or `name` | the revision |
    | s3 | the bucket | the prefix, without slashes around it |
    | url | `scheme://host`, and `:port` if it is not the scheme's own | the path, percent-encoded |
    """

    kind: Kind
    place: str
    path: str = ""
    login: str = field(default="", repr=False)  # url: `user:password`
    query: str = field(default="", repr=False)  # url: often a signature that is as good as a password

    @property
    def text(self) -> str:
        """The canonical text, secrets included: parsing it gives this value."""
        if self.kind != "url":
            return self.shown
        scheme, _, host = self.place.partition("://")
        return f"{scheme}://{self.login}{'@' if self.login else ''}{host}{self.path}{'?' if self.query else ''}{self.query}"

    @property
    def shown(self) -> str:
        """For logs and errors: without what may be a secret."""
        if self.kind == "hub":
            return f"hub://{self.place}" + ("" if self.path == MAIN else f"@{self.path}")
        if self.kind == "s3":
            return f"s3://{self.place}" + (f"/{self.path}" if self.path else "")
        return self.place + self.path + ("?…" if self.query else "")

    @property
    def url(self) -> str:
        """What to ask the server for: no login in it."""
        return self.place + self.path + ("?" if self.query else "") + self.query


def parse_source(text: str) -> Source:
    """The first rule that fits decides, and nothing is looked up:

    1. What begins with `/` or `./` is a local folder.
    2. What has `://` in it is what its scheme says: `file://`, `hub://`, `s3://`, `https://` or `http://`, the last two an archive whose
       path ends in .zip, .tar, .tar.gz or .tgz.
    3. `org/name`, `org/name@revision` and `name@revision` are of the hub.
    4. Anything else is none. A word alone is the name of an adapter: `hub://name` is the repository.

    No part of a path may be `..`, however it is encoded. Raises `SourceError`, which shows no more of the text than is surely no secret.
    """
    source = _parsed(text)
    if source.kind == "url" and not source.path.lower().endswith(ARCHIVES):
        raise _invalid(f"{source.shown}: the path of an archive must end in {', '.join(ARCHIVES)}")
    return source


def parse_url(text: str) -> Source:
    """Any http or https URL. Host and port are compared in lower case, paths with everything encoded in one way, fragments are dropped.
    Raises `SourceError`."""
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise _invalid("a URL must be scheme://host/path, the port a number below 65536") from None  # the error's own text shows it all
    host = f"[{host}]" if ":" in host else host
    path = unquote_to_bytes(parts.path or "/")
    if parts.scheme not in _PORTS or not _HOST.fullmatch(host):
        raise _invalid("a URL must be http:// or https://, and its host ASCII")
    if re.search(r"[\s\\]", text) or _UNREADABLE.search(path.decode("latin-1")) or re.search("%2f|%5c", parts.path, re.IGNORECASE):
        raise _invalid(f"{parts.scheme}://{host}: a URL must have no spaces, backslashes, control characters or encoded slashes")
    if {b".", b".."} & set(path.split(b"/")):
        raise _invalid(f"{parts.scheme}://{host}: no part of a path may be `.` or `..`")
    place = f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")
    return Source(
        "url", place, quote(path, safe="/-._~!$&'()*+,;=:@"), parts.netloc.rpartition("@")[0], quote(parts.query, safe=string.punctuation)
    )


@dataclass(frozen=True, slots=True)
class Allowed:
    """The places that an operator named at the start: nothing else is allowed, and by default nothing is. The list is the authority: what
    a host's name resolves to is not asked."""

    folders: tuple[str, ...] = ()  # absolute; what links in their paths lead to is resolved whenever it is asked
    organisations: tuple[str, ...] = ()  # of the hub; `*` is all of them, and repositories without one
    buckets: tuple[Source, ...] = ()  # with a prefix, or all of the bucket
    urls: tuple[Source, ...] = ()  # an origin, and the path that others must be below

    def allows(self, source: Source) -> bool:
        """A folder is where its links lead to, so one that leads out is not allowed."""
        match source.kind:
            case "local":
                return any(inside(source.place, folder) is not None for folder in self.folders)
            case "hub":
                organisation = source.place.rpartition("/")[0]
                return "*" in self.organisations or (organisation != "" and organisation in self.organisations)
            case "s3":
                return any(known.place == source.place and _below(source.path, known.path) for known in self.buckets)
            case "url":
                return any(known.place == source.place and _below(source.path, known.path) for known in self.urls)

    def plus(self, source: Source) -> Allowed:
        """And what an operator allows by naming this one."""
        match source.kind:
            case "local":  # and where the links in it lead to now, as those in a hub's cache do
                files = [os.path.join(source.place, name) for name in ("adapter_config.json", "adapter_model.safetensors")]
                places = [os.path.dirname(os.path.realpath(file)) for file in files]
                return replace(self, folders=(*self.folders, source.place, *places))
            case "hub":
                return replace(self, organisations=(*self.organisations, source.place.rpartition("/")[0] or "*"))
            case "s3":
                return replace(self, buckets=(*self.buckets, source))
            case "url":
                return replace(self, urls=(*self.urls, source))


def parse_allowed(texts: Iterable[str]) -> Allowed:
    """A folder (as a source is written), `hub://org`, `hub://*`, `s3://bucket`, `s3://bucket/prefix`, or `https://host/path`. Raises
    `SourceError`."""
    folders, organisations, buckets, urls = [], [], [], []
    for text in texts:
        if text.startswith("hub://"):
            organisation = text.removeprefix("hub://").rstrip("/")
            if organisation != "*" and not re.fullmatch(_WORD, organisation):
                raise _invalid(f"hub://{organisation[:96]!r}: what is allowed of the hub is hub://ORGANISATION or hub://*")
            organisations.append(organisation)
            continue
        source = _parsed(text)
        match source.kind:
            case "local":
                folders.append(source.place)
            case "s3":
                buckets.append(source)
            case "url" if not source.login and not source.query:
                urls.append(source)
            case _:
                raise _invalid(f"{source.shown}: it must be a folder, hub://ORGANISATION, s3://BUCKET/PREFIX or a URL without secrets")
    return Allowed(tuple(folders), tuple(organisations), tuple(buckets), tuple(urls))


def inside(path: str, folder: str) -> str | None:
    """The way from a folder to a path when all links in both are resolved, or None if that leads out of it."""
    try:
        real, root = os.path.realpath(path), os.path.realpath(folder)
    except OSError:  # a link that became something else while it was followed
        return None
    if real == root:
        return "."
    return os.path.relpath(real, root) if real.startswith(root.rstrip("/") + "/") else None


def _parsed(text: str) -> Source:
    if not text or len(text) > LONGEST or _UNREADABLE.search(text):
        raise _invalid(f"a source must have 1 to {LONGEST} characters, none of them a control character: this one has {len(text)}")
    if text.startswith(("/", "./")):
        return _local(text)
    scheme, separator, rest = text.partition("://")
    match scheme.lower() if separator else "":
        case "":
            hub = _HUB.fullmatch(text)
            if hub is None or ("/" not in hub["repo"] and hub["revision"] is None):
                raise _invalid(f"{_harmless(text)} is no source: a folder begins with / or ./, one of the hub is org/name or hub://name")
            return _hub(hub)
        case "file":
            path = unquote(rest.removeprefix("localhost"))
            if not path.startswith("/") or _UNREADABLE.search(path):
                raise _invalid("a file:// source must be file:///FOLDER, on this machine")
            return _local(path)
        case "hub":
            hub = _HUB.fullmatch(rest)
            if hub is None:
                raise _invalid("a hub:// source must be hub://org/name or hub://org/name@revision")
            return _hub(hub)
        case "s3":
            bucket, _, prefix = rest.partition("/")
            prefix = prefix.rstrip("/")
            if not _BUCKET.fullmatch(bucket) or (prefix and {"", ".", ".."} & set(prefix.split("/"))):
                raise _invalid("an s3:// source must be s3://bucket/prefix, no part of the prefix empty, `.` or `..`")
            return Source("s3", bucket, prefix)
        case "http" | "https":
            return parse_url(text)
    raise _invalid(f"{_harmless(scheme)}:// is no scheme of a source: file, hub, s3, https and http are")


def _local(path: str) -> Source:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _invalid(f"{path[:120]!r}: no part of a path may be `..`")
    try:
        start = "/" if path.startswith("/") else os.getcwd()
    except OSError:
        raise _invalid(f"{path[:120]!r}: the folder that the engine was started in is gone") from None
    return Source("local", os.path.join(start, *parts))


def _hub(match: re.Match[str]) -> Source:
    repo, revision = match["repo"], match["revision"] or MAIN
    if "--" in repo or ".." in repo or repo.endswith((".", "-", ".git")) or {"", ".", ".."} & set(revision.split("/")) or ".." in revision:
        raise _invalid(f"{repo}@{revision} cannot be the id and revision of a repository")
    return Source("hub", repo, revision)


def _below(path: str, prefix: str) -> bool:
    """Of paths that have no part `..`: whether one is the other, or under it. `/a` is not above `/ab`."""
    above = prefix.rstrip("/")
    return not above or path == above or path.startswith(above + "/")


def _harmless(text: str) -> str:
    """A text that could not be parsed may hold a password anywhere: one with the marks of a URL is not shown."""
    return repr(text[:60]) if re.fullmatch(r"[\w ./~-]*", text) else f"a text of {len(text)} characters"


def _invalid(message: str) -> SourceError:
    return SourceError("invalid", message)
