"""Archives on web servers that are real, slow, wrong or hostile."""

import base64
import datetime
import gzip
import io
import ipaddress
import os
import random
import ssl
import stat
import struct
import tarfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Fetched, Limits, Settings, fetch, probe
from penstock.actors.sources.source import parse_allowed, parse_source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b"{}", WEIGHTS: b"weights" * 100}
SECRET = "hunter2"
SHORT = Limits(connect=1.0, read=0.3, total=5.0)


class Server:
    """Answers of its own for each path, and what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                with suppress(ConnectionError):
                    outer.pages.get(self.path.partition("?")[0], lambda request: request.send_error(404))(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.url = f"http{'' if tls is None else 's'}://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def has(self, path: str, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> str:
        def page(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            for name, value in ({"Content-Length": str(len(body) if length is None else length)} | headers).items():
                request.send_header(name.replace("_", "-"), value)
            request.end_headers()
            request.wfile.write(body)

        self.pages[path] = page
        return self.url + path

    def drips(self, path: str, start: bytes, every: float = 0.05) -> str:
        """Raw bytes, and then one now and then, for as long as anybody listens."""

        def page(request: BaseHTTPRequestHandler) -> None:
            request.wfile.write(start)
            while not self.ended.wait(every):
                request.wfile.write(b"x")

        self.pages[path] = page
        return self.url + path

    def close(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    both = Server(), Server()
    yield both
    for server in both:
        server.close()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "around" / "into"
    folder.mkdir(parents=True)
    return folder


def allowing(*texts: str) -> Settings:
    return Settings(allowed=parse_allowed(texts))


def fetched(url: str, into: Path, limits: Limits = SHORT, token: str | None = None, *, allowed: tuple[str, ...] = ()) -> Fetched:
    return fetch(parse_source(url), into, token, limits, allowing(*(allowed or (parse_source(url).place,))))


def refusal(url: str, into: Path, limits: Limits = SHORT, token: str | None = None, *, allowed: tuple[str, ...] = ()) -> SourceError:
    """What fetching it ends with, which leaves nothing behind."""
    with pytest.raises(SourceError) as error:
        fetched(url, into, limits, token, allowed=allowed)
    assert os.listdir(into) == []
    assert os.listdir(into.parent) == ["into"]
    return error.value


def a_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def a_tar(files: dict[str, bytes], mode: str = "w", prepare: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            prepare(member)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def a_certificate(path: Path) -> Path:
    """One of its own for 127.0.0.1, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.zip", a_zip(FILES)),
        ("x.zip", a_zip({"README.md": b"#", **{f"run/best/{name}": data for name, data in FILES.items()}}, zipfile.ZIP_STORED)),
        ("x.tar", a_tar(FILES)),
        ("x.tgz", a_tar({**{f"./a/{name}": data for name, data in FILES.items()}, "a/optimizer.pt": b"o" * 50_000}, "w:gz")),
        ("x.tar.gz", a_tar({"d/" + "long" * 40 + "/" + name: data for name, data in FILES.items()}, "w:gz")),
        ("x.tar.gz", a_tar(FILES)),  # a server or a proxy may have unpacked it on the way
    ],
    ids=["zip", "nested", "tar", "tgz", "long", "unpacked"],
)
def test_an_archive_is_fetched_and_nothing_but_the_two_files_is_left(server: Server, into: Path, name: str, data: bytes) -> None:
    url = server.has("/a/" + name, data, ETag='"one"')
    found = fetched(url, into)
    assert {path.name: path.read_bytes() for path in into.iterdir()} == FILES
    assert found == Fetched(probe(parse_source(url), None, SHORT, allowing(server.url)), 702)


def test_a_revision_is_the_etag_or_the_date_or_nothing(server: Server, into: Path) -> None:
    body = a_zip(FILES)
    seen = []
    for headers in ({"ETag": '"1"'}, {"ETag": '"2"'}, {"Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, {}):
        url = server.has("/x.zip", body, **headers)
        seen.append(probe(parse_source(url), None, SHORT, allowing(server.url)))
    assert len(set(seen)) == 4
    assert seen[3] == ""


def test_a_probe_reads_no_body(server: Server) -> None:
    url = server.drips("/x.zip", b"HTTP/1.1 200 OK\r\nETag: 1\r\nContent-Length: 1000000000\r\n\r\n")
    assert probe(parse_source(url), None, SHORT, allowing(server.url)) == "etag 1"
    assert server.asked[0][1]["range"] == "bytes=0-0"


@pytest.mark.parametrize("files", [{f"../../{name}": data for name, data in FILES.items()} | {"/etc/x": b"", "../evil": b"e"}])
@pytest.mark.parametrize("pack", [a_zip, a_tar])
def test_no_name_in_an_archive_leads_anywhere(
    server: Server, into: Path, files: dict[str, bytes], pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    fetched(server.has("/x.zip", pack(files)), into)
    assert sorted(os.listdir(into)) == [CONFIG, WEIGHTS]
    assert os.listdir(into.parent) == ["into"]
    assert sorted(os.listdir(into.parent.parent)) == ["around"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_member_of_a_tar_that_is_no_regular_file_is_refused(server: Server, into: Path, kind: bytes) -> None:
    def prepare(member: tarfile.TarInfo) -> None:
        if member.name == WEIGHTS:
            member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    error = refusal(server.has("/x.tar", a_tar(FILES, prepare=prepare)), into)
    assert (error.code, "no regular file" in error.message) == ("broken_archive", True)


def test_a_link_in_a_zip_is_refused(server: Server, into: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(CONFIG, b"{}")
        link = zipfile.ZipInfo(WEIGHTS)
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    error = refusal(server.has("/x.zip", data.getvalue()), into)
    assert (error.code, "no regular file" in error.message) == ("broken_archive", True)


def test_an_encrypted_or_oddly_compressed_member_is_refused(server: Server, into: Path) -> None:
    data = bytearray(a_zip(FILES, zipfile.ZIP_STORED))
    entry = data.index(b"PK\1\2")
    data[entry + 8] |= 1
    assert "is encrypted" in refusal(server.has("/x.zip", bytes(data)), into).message
    assert "neither stored nor deflated" in refusal(server.has("/x.zip", a_zip(FILES, zipfile.ZIP_LZMA)), into).message


@pytest.mark.parametrize("pack", [a_zip, a_tar])
@pytest.mark.parametrize(
    ("names", "code", "text"),
    [
        ([f"{folder}/{name}" for folder in "ab" for name in FILES], "broken_archive", f"'a/{CONFIG}', 'a/{WEIGHTS}', 'b/{CONFIG}'"),
        ([f"a/{CONFIG}", f"b/{WEIGHTS}"], "broken_archive", f"'a/{CONFIG}', 'b/{WEIGHTS}'"),
        ([f"a/{CONFIG}", f"a/{WEIGHTS}", f"b/{WEIGHTS}"], "broken_archive", f"'b/{WEIGHTS}'"),
        ([CONFIG, "adapter_model.bin"], "no_safetensors", WEIGHTS),
        (["config.json", "model.safetensors"], "not_found", CONFIG),
        ([], "not_found", CONFIG),
    ],
)
def test_an_archive_holds_exactly_one_adapter(
    server: Server, into: Path, pack: Callable[[dict[str, bytes]], bytes], names: list[str], code: str, text: str
) -> None:
    error = refusal(server.has("/x.zip", pack(dict.fromkeys(names, b"{}"))), into)
    assert error.code == code
    assert text in error.message


def test_what_is_no_archive_is_refused(server: Server, into: Path) -> None:
    for data in (b"", b"x", b"PK", b"PK\5\6", b"\x1f\x8b", b"<html>sign in</html>" * 100, a_zip(FILES)[:-30], a_tar(FILES, "w:gz")[:-30]):
        assert refusal(server.has("/x.zip", data), into).code == "broken_archive"


@pytest.mark.parametrize(("name", "data"), [("x.zip", a_zip(FILES)), ("x.tgz", a_tar(FILES, "w:gz"))], ids=["zip", "tgz"])
def test_an_archive_with_a_changed_byte_is_refused_or_means_the_same(server: Server, into: Path, name: str, data: bytes) -> None:
    draw = random.Random(0)
    for _ in range(250):
        at = draw.randrange(len(data))
        changed = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        try:
            fetched(server.has("/" + name, changed), into)
        except SourceError:
            assert os.listdir(into) == []
        else:
            assert {path.name: path.read_bytes() for path in into.iterdir()} == FILES
            for path in into.iterdir():
                path.unlink()


def test_a_bomb_is_put_out_at_the_limit(server: Server, into: Path) -> None:
    small = Limits(connect=1.0, read=1.0, total=10.0, file_bytes=2**20)
    zeros = bytes(32 * 2**20)
    assert refusal(server.has("/x.zip", a_zip({CONFIG: b"{}", WEIGHTS: zeros})), into, small).code == "too_large"
    assert refusal(server.has("/x.tgz", a_tar({CONFIG: b"{}", WEIGHTS: zeros}, "w:gz")), into, small).code == "too_large"
    assert refusal(server.has("/x.tgz", a_tar({"junk": zeros, **FILES}, "w:gz")), into, small).code == "too_large"
    assert refusal(server.has("/x.tgz", gzip.compress(a_tar(FILES) + zeros)), into, small).code == "broken_archive"


def test_a_zip_that_lies_about_sizes_is_refused(server: Server, into: Path) -> None:
    data = bytearray(a_zip({CONFIG: b"{}", WEIGHTS: bytes(8 * 2**20)}))
    for mark, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = data.index(mark, data.index(mark) + 4)
        data[at + offset : at + offset + 4] = struct.pack("<I", 1000)
    error = refusal(server.has("/x.zip", bytes(data)), into, Limits(connect=1.0, read=1.0, total=10.0, file_bytes=2**20))
    assert error.code == "broken_archive"


def test_headers_of_an_archive_are_not_read_for_ever(server: Server, into: Path) -> None:
    def prepare(member: tarfile.TarInfo) -> None:
        member.pax_headers = {"comment": "c" * (3 * 2**20)} if member.name == CONFIG else {}

    many = {f"{number:0200}": b"" for number in range(6000)}
    for data in (a_tar(FILES, "w:gz", prepare), a_zip({**many, **FILES}), a_tar(dict.fromkeys(map(str, range(10_001)), b""), "w:gz")):
        assert refusal(server.has("/x.zip", data), into).code == "broken_archive"


def test_a_body_above_the_limit_is_refused_whether_or_not_it_says_so(server: Server, into: Path) -> None:
    small = Limits(connect=1.0, read=1.0, total=5.0, file_bytes=1000)
    body = bytes(100_000)
    error = refusal(server.has("/x.zip", body), into, small)
    assert (error.code, "100000 bytes" in error.message) == ("too_large", True)
    server.pages["/y.zip"] = lambda request: request.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)
    assert refusal(server.url + "/y.zip", into, small).code == "too_large"


def test_a_body_that_ends_early_is_no_archive_but_a_fault_of_the_line(server: Server, into: Path) -> None:
    error = refusal(server.has("/x.zip", a_zip(FILES), length=10**6), into)
    assert (error.code, error.retry) == ("unreachable", True)
    assert "of 1000000 bytes" in error.message


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"])
def test_a_slow_server_is_left_in_time_however_it_is_slow(server: Server, into: Path, start: bytes) -> None:
    for every, limits in ((60.0, SHORT), (0.02, Limits(connect=1.0, read=1.0, total=0.4))):
        url = server.drips("/x.zip", start, every)
        begin = time.monotonic()
        error = refusal(url, into, limits)
        assert (error.code, error.retry) == ("timed_out", True)
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"])
def test_what_nobody_waits_for_any_more_ends_early(server: Server, into: Path, start: bytes) -> None:
    limits = Limits(connect=1.0, read=1.0, total=10.0)
    threading.Timer(0.2, limits.stop.set).start()
    begin = time.monotonic()
    error = refusal(server.drips("/x.zip", start, 0.02), into, limits)
    assert (error.code, error.retry) == ("stopped", True)
    assert time.monotonic() - begin < 5
    assert not any(into.iterdir())


def test_where_nobody_listens_nothing_is_reached(server: Server, into: Path) -> None:
    server.close()
    error = refusal(server.url + "/x.zip", into)
    assert (error.code, error.retry) == ("unreachable", True)
    assert refusal("http://nowhere.invalid/x.zip", into, allowed=("http://nowhere.invalid",)).code == "unreachable"


def test_what_answers_with_something_else_than_http_is_unreachable(server: Server, into: Path) -> None:
    ok = b"HTTP/1.1 200 OK\r\n"
    for data in (b"SSH-2.0\r\n", b"\r\n", ok + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", ok + b"a: b\r\n" * 200, ok + b"a" * 10**6):
        server.pages["/x.zip"] = lambda request, data=data: request.wfile.write(data)
        assert refusal(server.url + "/x.zip", into).code == "unreachable"


@pytest.mark.parametrize(
    ("status", "code", "retry"),
    [
        (401, "not_allowed", False), (403, "not_allowed", False), (404, "not_found", False), (410, "not_found", False),
        (400, "unreachable", False), (429, "unreachable", True), (500, "unreachable", True), (503, "unreachable", True),
        (304, "unreachable", False),
    ],
)  # fmt: skip
def test_a_status_says_what_is_wrong_and_whether_to_try_again(server: Server, into: Path, status: int, code: str, retry: bool) -> None:
    url = server.has("/x.zip", b"", status)
    error = refusal(url, into)
    assert (error.code, error.retry) == (code, retry)
    with pytest.raises(SourceError) as probed:
        probe(parse_source(url), None, SHORT, allowing(server.url))
    assert probed.value.code == code


def test_a_private_archive_needs_the_token_at_each_use(server: Server, into: Path) -> None:
    server.has("/yes", a_zip(FILES))
    server.has("/no", b"", 401)
    server.pages["/x.zip"] = lambda request: server.pages["/yes" if request.headers["Authorization"] == "Bearer right" else "/no"](request)
    source = parse_source(server.url + "/x.zip")
    fetch(source, into, "right", SHORT, allowing(server.url))
    probe(source, "right", SHORT, allowing(server.url))
    for token in ("wrong", None):
        with pytest.raises(SourceError) as error:
            probe(source, token, SHORT, allowing(server.url))
        assert error.value.code == "not_allowed"
        assert "wrong" not in str(error.value)


def test_a_login_in_the_url_is_sent_as_one_unless_there_is_a_token(server: Server, into: Path) -> None:
    url = server.has("/x.zip", a_zip(FILES)).replace("//", f"//me:{SECRET}%40@")
    for token, sent in ((None, "Basic " + base64.b64encode(f"me:{SECRET}@".encode()).decode()), ("t", "Bearer t")):
        probe(parse_source(url), token, SHORT, allowing(server.url))
        assert server.asked[-1][1]["authorization"] == sent


def test_redirects_are_followed_where_it_is_allowed_and_the_token_stays_at_its_origin(servers: tuple[Server, Server], into: Path) -> None:
    first, second = servers
    second.has("/there/y", a_zip(FILES), ETag='"far"')
    second.has("/back", b"", 302, Location=first.url + "/final")
    first.has("/final", b"", 307, Location=second.url + "/there/y?signature=1")
    first.has("/near", b"", 301, Location=second.url + "/back")
    url = first.has("/x.zip", b"", 308, Location="near")
    found = fetched(url, into, token=SECRET, allowed=(first.url, second.url))
    assert found.revision == 'etag "far"'
    assert [(path, headers.get("authorization")) for path, headers in first.asked] == [
        ("/x.zip", f"Bearer {SECRET}"), ("/near", f"Bearer {SECRET}"), ("/final", None),
    ]  # fmt: skip
    assert [(path, headers.get("authorization")) for path, headers in second.asked] == [("/back", None), ("/there/y?signature=1", None)]


@pytest.mark.parametrize("below", ["/private/y", "/there/../private/y", "/there/%2e%2e/y", "/there%2f..%2fy", "//there/y", "/there2/y"])
def test_no_redirect_leads_to_what_is_not_allowed(servers: tuple[Server, Server], into: Path, below: str) -> None:
    first, second = servers
    url = first.has("/x.zip", b"", 302, Location=second.url + below)
    assert refusal(url, into, token="t", allowed=(first.url, second.url + "/there/")).code in ("not_listed", "unreachable")
    with pytest.raises(SourceError):
        probe(parse_source(url), "t", SHORT, allowing(first.url, second.url + "/there/"))
    assert (len(first.asked), second.asked) == (2, [])


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://u:p@127.0.0.1", "http://[", "http://\xff/", "data:,x"])
def test_a_redirect_to_what_is_no_url_ends_it(server: Server, into: Path, place: str) -> None:
    error = refusal(server.has("/x.zip", b"", 302, Location=place), into)
    assert (error.code, error.retry) == ("unreachable", False)
    assert len(server.asked) == 1


def test_redirects_in_a_circle_end(server: Server, into: Path) -> None:
    error = refusal(server.has("/x.zip", b"", 302, Location="/x.zip"), into)
    assert "redirects more than 5 times" in error.message
    assert len(server.asked) == 6


def test_the_body_of_a_redirect_is_not_waited_for(servers: tuple[Server, Server], into: Path) -> None:
    first, second = servers
    location = second.has("/y.zip", a_zip(FILES))
    url = first.drips("/x.zip", f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 1000000000\r\n\r\n".encode(), 0.01)
    fetched(url, into, allowed=(first.url, second.url))


def test_a_server_must_prove_who_it_is(into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = a_certificate(tmp_path / "server.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(tls)
    url = server.has("/x.zip", a_zip(FILES), ETag="1")
    with pytest.raises(SourceError) as error:
        fetched(url, into, token=SECRET)
    assert (error.value.code, server.asked) == ("unreachable", [])
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetched(url, into, token=SECRET).revision == "etag 1"
    for every, limits in ((60.0, SHORT), (0.02, Limits(connect=1.0, read=1.0, total=0.4))):
        with pytest.raises(SourceError) as error:
            probe(parse_source(server.drips("/y.zip", b"HTTP/1.1 200 OK\r\nX: ", every)), None, limits, allowing(server.url))
        assert error.value.code == "timed_out"
    server.close()


@pytest.mark.parametrize("location", [None, f"http://127.0.0.1:1/?{SECRET}", f"http://x:{SECRET}@127.0.0.1/", f"ht!tp://{SECRET}"])
def test_no_error_shows_a_secret_wherever_it_comes_from(server: Server, into: Path, location: str | None) -> None:
    server.has("/x.zip", b"", 403 if location is None else 302, **({} if location is None else {"Location": location}))
    for url in (server.url, "http://127.0.0.1:1", "http://nowhere.invalid"):
        text = url.replace("//", f"//me:{SECRET}@") + f"/x.zip?signature={SECRET}"
        error = refusal(text, into, token=SECRET, allowed=(url, "http://127.0.0.1:1"))
        assert SECRET not in "".join(traceback.format_exception(error))
