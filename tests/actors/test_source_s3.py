"""The real client library, a server that speaks S3, and wires that fail."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.session import Session

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Fetched, Limits, Settings, fetch, probe
from penstock.actors.sources.source import parse_allowed, parse_source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHORT = Limits(connect=1.0, read=2.0, total=10.0)


class Cloud:
    """A moto server in a process of its own, and its owner's clients."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-u", "-m", "moto.server", "-p", "0"], stdout=file, stderr=file)
        end = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text())
            time.sleep(0.02)
        self.url = found[0]
        self.s3 = self.client("s3")
        self.s3.create_bucket(Bucket="adapters")

    def client(self, service: str) -> Any:
        session = Session()
        session.set_credentials("owner", "owner")
        return session.create_client(service, region_name="us-east-1", endpoint_url=self.url)

    def put(self, prefix: str, bucket: str = "adapters", **files: bytes) -> str:
        for name, data in ({"config": b"{}", "weights": b"weights" * 1000} | files).items():
            key = {"config": CONFIG, "weights": WEIGHTS}.get(name, name)
            self.s3.put_object(Bucket=bucket, Key=f"{prefix}/{key}".lstrip("/"), Body=data)
        return f"s3://{bucket}/{prefix}"

    def check_credentials(self, check: bool) -> None:
        request = urllib.request.Request(self.url + "/moto-api/reset-auth", b"0" if check else b"inf", {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=10).close()

    def new_user(self) -> tuple[str, str]:
        iam = self.client("iam")
        iam.create_user(UserName="user")
        right = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::adapters/*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [right]})
        iam.put_user_policy(UserName="user", PolicyName="read", PolicyDocument=policy)
        key = iam.create_access_key(UserName="user")["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        cloud = Cloud(tmp_path_factory.mktemp("moto") / "log")
        yield cloud
        cloud.process.kill()
        cloud.process.wait()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration of whoever runs the tests, and credentials as an operator has them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "operator")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "operator")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def at(endpoint: str) -> Settings:
    return Settings(allowed=parse_allowed(["s3://adapters", "s3://nowhere", "s3://versions"]), s3_endpoint=endpoint)


def refusal(endpoint: str, text: str, into: Path, limits: Limits = SHORT, token: str | None = None) -> SourceError:
    with pytest.raises(SourceError) as error:
        fetch(parse_source(text), into, token, limits, at(endpoint))
    assert os.listdir(into) == []
    return error.value


def probed(endpoint: str, text: str, token: str | None = None, limits: Limits = SHORT) -> str:
    try:
        return probe(parse_source(text), token, limits, at(endpoint))
    except SourceError as error:
        return error.code


def a_server(answer: Callable[[socket.socket, bytes], None]) -> str:
    """Answers each connection's first request by hand."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            answer(connection, connection.recv(65536))

    def serve() -> None:
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("prefix", ["", "team/mine", "a b+c/ü"])
def test_an_adapter_is_fetched_and_probed(cloud: Cloud, into: Path, prefix: str) -> None:
    source = parse_source(cloud.put(prefix, README=b"#"))
    found = fetch(source, into, None, SHORT, at(cloud.url))
    assert found == Fetched(probe(source, None, SHORT, at(cloud.url)), 7002)
    assert {path.name: path.read_bytes() for path in into.iterdir()} == {CONFIG: b"{}", WEIGHTS: b"weights" * 1000}


def test_an_object_that_is_written_anew_is_another_revision(cloud: Cloud) -> None:
    text = cloud.put("changing")
    first = probed(cloud.url, text)
    assert probed(cloud.url, text) == first
    cloud.put("changing", weights=b"others")
    assert probed(cloud.url, text) != first


def test_in_a_bucket_with_versions_equal_bytes_are_told_apart(cloud: Cloud, into: Path) -> None:
    cloud.s3.create_bucket(Bucket="versions")
    cloud.s3.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    text = cloud.put("x", "versions")
    first = fetch(parse_source(text), into, None, SHORT, at(cloud.url)).revision
    assert probed(cloud.url, text) == first
    cloud.put("x", "versions")
    assert probed(cloud.url, text) != first


def test_what_is_missing_is_named(cloud: Cloud, into: Path) -> None:
    cloud.s3.put_object(Bucket="adapters", Key=f"pickled/{CONFIG}", Body=b"{}")
    cloud.s3.put_object(Bucket="adapters", Key="pickled/adapter_model.bin", Body=b"w")
    for text, code, says in (
        ("s3://adapters/pickled", "no_safetensors", WEIGHTS),
        ("s3://adapters/nothing", "not_found", CONFIG),
        ("s3://nowhere/x", "not_found", "s3://nowhere/x"),
        ("s3://others/x", "not_listed", "s3://others/x"),
    ):
        error = refusal(cloud.url, text, into)
        assert (error.code, says in error.message) == (code, True)
        assert probed(cloud.url, text) == code


def test_a_file_above_the_limit_is_refused(cloud: Cloud, into: Path) -> None:
    text = cloud.put("large")
    error = refusal(cloud.url, text, into, Limits(connect=1.0, read=2.0, total=10.0, file_bytes=6999))
    assert (error.code, "7000 bytes" in error.message) == ("too_large", True)


def test_credentials_are_checked_at_each_use_and_the_operators_are_not_lent(cloud: Cloud, into: Path) -> None:
    text = cloud.put("private")
    access, secret = cloud.new_user()
    cloud.check_credentials(True)
    try:
        fetch(parse_source(text), into, f"{access}:{secret}", SHORT, at(cloud.url))
        assert probed(cloud.url, text, f"{access}:{secret}").startswith('"')
        for token in (f"{access}:wrong", f"nobody:{secret}", f"{access}:{secret}:session", access, f"{access}:", "a:b:c:d", None):
            assert probed(cloud.url, text, token) == "not_allowed"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", access)
            patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            assert probed(cloud.url, text).startswith('"')  # without a token it is the operator who reads
            assert probed(cloud.url, text, "nobody:wrong") == "not_allowed"
    finally:
        cloud.check_credentials(False)


def test_where_there_are_no_credentials_at_all_it_is_said(cloud: Cloud, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = refusal(cloud.url, "s3://adapters/x", into)
    assert (error.code, "no credentials" in error.message) == ("not_allowed", True)


def test_a_body_that_ends_early_is_a_fault_of_the_line(into: Path) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        whole = CONFIG.encode() in request
        connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: ' + (b"2" if whole else b"1000") + b"\r\n\r\n{}")

    error = refusal(a_server(answer), "s3://adapters/x", into)
    assert (error.code, error.retry, WEIGHTS in error.message) == ("unreachable", True, True)


@pytest.mark.parametrize("start", [b"", b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 1000\r\n\r\n'], ids=["header", "body"])
def test_a_server_that_stalls_is_left_in_time(into: Path, start: bytes) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(start)
        connection.recv(1)

    begin = time.monotonic()
    error = refusal(a_server(answer), "s3://adapters/x", into, Limits(connect=1.0, read=0.3, total=5.0))
    assert (error.code, error.retry) == ("timed_out", True)
    assert time.monotonic() - begin < 5


def test_a_body_that_trickles_is_left_at_the_deadline(into: Path) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 1000\r\n\r\n')
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)

    begin = time.monotonic()
    error = refusal(a_server(answer), "s3://adapters/x", into, Limits(connect=1.0, read=1.0, total=0.5))
    assert error.code == "timed_out"
    assert time.monotonic() - begin < 5


def test_a_server_that_is_ill_or_gone_is_worth_another_try(into: Path) -> None:
    ill = a_server(lambda connection, _: connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n"))
    listener = socket.create_server(("127.0.0.1", 0))
    gone = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    nonsense = a_server(lambda connection, _: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    for endpoint in (ill, gone, nonsense):
        error = refusal(endpoint, "s3://adapters/x", into)
        assert (error.code, error.retry) == ("unreachable", True)
        assert probed(endpoint, "s3://adapters/x") == "unreachable"


def test_no_error_and_no_log_shows_the_secret(cloud: Cloud, into: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stalled = a_server(lambda connection, _: connection.recv(1) and None)
    limits = Limits(connect=1.0, read=0.2, total=5.0)
    errors = [refusal(endpoint, "s3://adapters/nothing", into, limits, "me:hunter2:hunter2") for endpoint in (cloud.url, stalled)]
    errors.append(refusal(cloud.url, "s3://adapters/nothing", into, limits, "hunter2"))
    assert "hunter2" not in "".join("".join(traceback.format_exception(error)) for error in errors)
    assert "hunter2" not in caplog.text


def test_without_the_library_it_is_said_what_to_install(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "botocore"]:
        monkeypatch.setitem(sys.modules, name, None)
    error = refusal("http://127.0.0.1:1", "s3://adapters/x", into)
    assert (error.code, "penstock[s3]" in error.message) == ("not_installed", True)
