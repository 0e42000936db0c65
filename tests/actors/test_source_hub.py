"""The real client library and a hub that speaks as much of its protocol as is needed."""

import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Fetched, Limits, Settings, fetch, probe
from penstock.actors.sources.source import parse_allowed, parse_source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ONE, TWO = "1" * 40, "2" * 40
TOKEN = "hf_hunter2"
SHORT = Limits(connect=1.0, read=0.3, total=5.0)


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False  # hidden from whoever has not the token
    gated: bool = False  # known to all, its files are not for all


class Server:
    """Half of a hub: either what answers for repositories, or the store that it redirects to for weights."""

    def __init__(self, host: str) -> None:
        self.asked: list[tuple[str, str, str | None]] = []
        self.headers: dict[str, str] = {}
        self.ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.command, self.path, self.headers["Authorization"]))
                with suppress(ConnectionError):
                    outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer((host, 0), Handler)
        self.url = f"http://{host}:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
        request.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def close(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()


class Store(Server):
    def __init__(self) -> None:
        super().__init__("127.0.0.2")  # on another host, which for some versions of the library another port is not
        self.blobs: dict[str, bytes] = {}
        self.length: int | None = None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = self.blobs[request.path.partition("?")[0]]
        self.send(request, 200, body, Content_Length=str(len(body) if self.length is None else self.length))


class Hub(Server):
    def __init__(self, store: Store) -> None:
        super().__init__("127.0.0.1")
        self.store = store
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.stalled = False
        self.status: int | None = None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.stalled:
            self.ended.wait()
            return
        if self.status is not None:
            return self.send(request, self.status)
        name, _, rest = request.path[1:].partition("/resolve/")
        revision, _, file = rest.rpartition("/")
        if name in self.renamed:
            return self.send(request, 307, Location=f"/{self.renamed[name]}/resolve/{rest}")
        repo, knows = self.repos.get(name), request.headers["Authorization"] == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not knows):
            return self.send(request, 404 if request.headers["Authorization"] else 401, X_Error_Code="RepoNotFound")
        if repo.gated and not knows:
            return self.send(request, 403, X_Error_Code="GatedRepo", X_Repo_Commit=repo.refs["main"])
        commit = repo.refs.get(revision.replace("%2F", "/"), revision)
        if commit not in repo.commits:
            return self.send(request, 404, X_Error_Code="RevisionNotFound")
        if file not in repo.commits[commit]:
            return self.send(request, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        body = repo.commits[commit][file]
        if not file.endswith(".safetensors"):
            return self.send(request, 200, body, X_Repo_Commit=commit, ETag='"small"')
        self.store.blobs[f"/{commit}/{file}"] = body
        place = f"{self.store.url}/{commit}/{file}?Signature=hunter2"
        self.send(request, 302, Location=place, X_Repo_Commit=commit, X_Linked_Size=str(len(body)), X_Linked_ETag='"large"')


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,127.0.0.2")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator")
    store = Store()
    hub = Hub(store)
    files = {CONFIG: b"{}", WEIGHTS: b"weights" * 1000, "README.md": b"#"}
    hub.repos["org/name"] = Repo({ONE: files, TWO: {**files, CONFIG: b"{2}"}}, {"main": ONE, "refs/pr/1": TWO})
    hub.repos["org/private"] = Repo({ONE: files}, {"main": ONE}, private=True)
    hub.repos["org/gated"] = Repo({ONE: files}, {"main": ONE}, gated=True)
    hub.repos["org/pickled"] = Repo({ONE: {CONFIG: b"{}", "adapter_model.bin": b"w"}}, {"main": ONE})
    hub.repos["org/bare"] = Repo({ONE: {WEIGHTS: b"w"}}, {"main": ONE})
    yield hub
    hub.close()
    store.close()


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def on(hub: Hub) -> Settings:
    return Settings(allowed=parse_allowed(["hub://org"]), hub_endpoint=hub.url)


def refusal(hub: Hub, text: str, into: Path, limits: Limits = SHORT, token: str | None = None) -> SourceError:
    with pytest.raises(SourceError) as error:
        fetch(parse_source(text), into, token, limits, on(hub))
    assert os.listdir(into) == []
    return error.value


def probed(hub: Hub, text: str, token: str | None = None, limits: Limits = SHORT) -> str:
    try:
        return probe(parse_source(text), token, limits, on(hub))
    except SourceError as error:
        return error.code


def test_an_adapter_is_fetched_at_the_commit_that_is_found(hub: Hub, into: Path) -> None:
    assert fetch(parse_source("org/name"), into, None, SHORT, on(hub)) == Fetched(ONE, 7002)
    assert {path.name: path.read_bytes() for path in into.iterdir()} == {CONFIG: b"{}", WEIGHTS: b"weights" * 1000}
    assert [path for command, path, _ in hub.asked if command == "GET"] == [f"/org/name/resolve/{ONE}/{name}" for name in (CONFIG, WEIGHTS)]


@pytest.mark.parametrize(("revision", "commit"), [("main", ONE), ("refs/pr/1", TWO), (TWO, TWO)])
def test_a_revision_is_a_branch_or_a_commit(hub: Hub, into: Path, revision: str, commit: str) -> None:
    text = f"org/name@{revision}"
    assert fetch(parse_source(text), into, None, SHORT, on(hub)).revision == probed(hub, text) == commit


def test_a_probe_is_one_request_and_sees_when_a_branch_moves(hub: Hub) -> None:
    assert probed(hub, "org/name") == ONE
    hub.repos["org/name"].refs["main"] = TWO
    assert probed(hub, "org/name") == TWO
    assert [command for command, *_ in hub.asked] == ["HEAD", "HEAD"]
    assert hub.store.asked == []


def test_a_branch_that_moves_meanwhile_mixes_nothing(hub: Hub, into: Path) -> None:
    answer = hub.answer

    def moving(request: BaseHTTPRequestHandler) -> None:
        answer(request)
        hub.repos["org/name"].refs["main"] = TWO

    hub.answer = moving
    assert fetch(parse_source("org/name"), into, None, SHORT, on(hub)).revision == ONE
    assert (into / CONFIG).read_bytes() == b"{}"


def test_a_private_repository_is_for_its_token_alone_at_each_use(hub: Hub, into: Path) -> None:
    fetch(parse_source("org/private"), into, TOKEN, SHORT, on(hub))
    assert probed(hub, "org/private", TOKEN) == ONE
    assert probed(hub, "org/private", "hf_other") == "not_found"  # a hub does not tell a stranger that it is there
    assert probed(hub, "org/private") == "not_allowed"


def test_a_gated_repository_is_not_for_those_who_were_not_let_in(hub: Hub, into: Path) -> None:
    assert probed(hub, "org/gated", TOKEN) == ONE
    assert probed(hub, "org/gated", "hf_other") == "not_allowed"
    assert probed(hub, "org/gated") == "not_allowed"
    assert refusal(hub, "org/gated", into).code == "not_allowed"


def test_the_login_of_the_machine_is_never_used(hub: Hub, into: Path) -> None:
    fetch(parse_source("org/name"), into, None, SHORT, on(hub))
    probed(hub, "org/private")
    assert {authorization for *_, authorization in hub.asked} == {None}


def test_a_token_goes_to_the_hub_and_not_to_its_store(hub: Hub, into: Path) -> None:
    fetch(parse_source("org/private"), into, TOKEN, SHORT, on(hub))
    assert {authorization for *_, authorization in hub.asked} == {f"Bearer {TOKEN}"}
    assert hub.store.asked == [("GET", f"/{ONE}/{WEIGHTS}?Signature=hunter2", None)]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("org/nothing", "not_allowed", "HTTP 401"),  # without a token a hub does not tell one from the other
        ("org/name@nothing", "not_found", "no such revision"),
        ("org/pickled", "no_safetensors", WEIGHTS),
        ("org/bare", "not_found", CONFIG),
        ("other/name", "not_listed", "hub://other/name"),
    ],
)
def test_what_is_missing_is_named(hub: Hub, into: Path, text: str, code: str, says: str) -> None:
    error = refusal(hub, text, into)
    assert (error.code, says in error.message) == (code, True)


def test_a_renamed_repository_is_found(hub: Hub, into: Path) -> None:
    hub.renamed["org/old"] = "org/name"
    assert fetch(parse_source("org/old"), into, TOKEN, SHORT, on(hub)).revision == probed(hub, "org/old") == ONE


def test_weights_above_the_limit_are_not_asked_for(hub: Hub, into: Path) -> None:
    error = refusal(hub, "org/name", into, Limits(connect=1.0, read=0.3, total=5.0, file_bytes=6999))
    assert (error.code, "7000 bytes" in error.message) == ("too_large", True)
    assert [command for command, *_ in hub.asked] == ["HEAD"]


def test_a_body_that_ends_early_is_a_fault_of_the_line(hub: Hub, into: Path) -> None:
    hub.store.length = 8000
    error = refusal(hub, "org/name", into)
    assert (error.code, error.retry) == ("unreachable", True)


def test_a_hub_that_stalls_is_left_in_time(hub: Hub, into: Path) -> None:
    for stall in ("hub", "store"):
        hub.stalled = stall == "hub"
        if stall == "store":
            hub.store.answer = lambda request: hub.store.ended.wait()
        begin = time.monotonic()
        error = refusal(hub, "org/name", into)
        assert (error.code, error.retry) == ("timed_out", True)
        assert time.monotonic() - begin < 4


def test_a_hub_that_is_gone_or_ill_is_worth_another_try(hub: Hub, into: Path) -> None:
    for status, retry in ((500, True), (503, True), (429, True), (418, False)):
        hub.status = status
        error = refusal(hub, "org/name", into)
        assert (error.code, error.retry) == ("unreachable", retry)
    hub.close()
    error = refusal(hub, "org/name", into)
    assert (error.code, error.retry) == ("unreachable", True)


def test_a_server_that_names_no_commit_is_no_hub(hub: Hub, into: Path) -> None:
    hub.status = 200
    assert refusal(hub, "org/name", into).code == "unreachable"


def test_no_error_and_no_log_shows_the_token_or_a_signed_url(hub: Hub, into: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hub.store.length = 8000
    errors = [refusal(hub, text, into, token=TOKEN) for text in ("org/name", "org/nothing", "org/pickled", "org/private")]
    hub.stalled = True
    errors.append(refusal(hub, "org/name", into, token=TOKEN))
    hub.close()
    errors.append(refusal(hub, "org/name", into, token=TOKEN))
    assert "hunter2" not in "".join("".join(traceback.format_exception(error)) for error in errors)
    assert "hunter2" not in caplog.text
