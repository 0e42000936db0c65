"""What texts are which sources, what an operator's list lets through, and folders of this machine."""

import os
import pickle
import threading
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.actors.sources.errors import SourceError
from penstock.actors.sources.fetch import Fetched, Limits, Settings, fetch, probe
from penstock.actors.sources.source import Allowed, Source, parse_allowed, parse_source

SECRET = "hunter2"


def allowing(*texts: object) -> Settings:
    return Settings(allowed=parse_allowed(map(str, texts)))


def an_adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def code_of(error: pytest.ExceptionInfo[SourceError]) -> str:
    return error.value.code


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/srv/adapters/a", Source("local", "/srv/adapters/a")),
        ("//srv/./adapters//a/", Source("local", "/srv/adapters/a")),
        ("/srv/a://b", Source("local", "/srv/a:/b")),
        ("file:///srv/my%20adapters", Source("local", "/srv/my adapters")),
        ("file://localhost/srv", Source("local", "/srv")),
        ("./a/b", Source("local", os.path.join(os.getcwd(), "a/b"))),
        ("org/name", Source("hub", "org/name", "main")),
        ("org/name@main", Source("hub", "org/name", "main")),
        ("org/name@refs/pr/1", Source("hub", "org/name", "refs/pr/1")),
        ("name@v1", Source("hub", "name", "v1")),
        ("hub://name", Source("hub", "name", "main")),
        ("HUB://org/name@0123abc", Source("hub", "org/name", "0123abc")),
        ("org/name.zip", Source("hub", "org/name.zip", "main")),
        ("s3://bucket", Source("s3", "bucket")),
        ("s3://bucket/a/b c/", Source("s3", "bucket", "a/b c")),
        ("https://Host.example:443/a/x.zip#part", Source("url", "https://host.example", "/a/x.zip")),
        ("http://host:8080/%61/x%20y.TGZ", Source("url", "http://host:8080", "/a/x%20y.TGZ")),
        ("https://[::1]/x.tar", Source("url", "https://[::1]", "/x.tar")),
        ("https://u:p@host/x.tar.gz?sig=1", Source("url", "https://host", "/x.tar.gz", "u:p", "sig=1")),
    ],
)
def test_a_text_is_one_source_and_its_canonical_text_the_same_one(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(source.text) == source


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "a/b/c", "../a", "~/a", "./a/../../b", "/a/..", "file://host/a", "file:///a/%2e%2e/b", "/a\0b", "/a\nb", "/\udc80",
        "org/../name", "org/name@../x", "org/name@", "@x", "hub://", "hub://a/b/c", "org/-x", "-org/x", "org/a--b", "org/name.git",
        "s3://", "s3://B", "s3://bucket//a", "s3://bucket/a/../b", "s3://user:pw@bucket/a", "ftp://host/x.zip", "gopher://x",
        "https://host/x", "https:///x.zip", "https://host:99999/x.zip", "https://host/a/../x.zip", "https://host/a/%2e%2E/x.zip",
        "https://host/a%2fx.zip", "https://host/a b.zip", "https://good\\@evil/x.zip", "https://ho%20st/x.zip", "https://hôst/x.zip",
        "https://host/x.zip?a\r\nb", "https://host/%0d%0a.zip", "https://[::1/x.zip", "a" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(SourceError) as error:
        parse_source(text)
    assert code_of(error) == "invalid"


@given(st.one_of(st.text(), st.builds("{}{}".format, st.sampled_from(["https://", "s3://", "hub://", "file:///", "./", "a/"]), st.text())))
def test_any_text_is_a_source_that_its_own_text_gives_again_or_is_refused(text: str) -> None:
    with suppress(SourceError):
        parse_allowed([text])
    with suppress(SourceError):
        source = parse_source(text)
        assert parse_source(source.text) == source


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/x.zip", f"https://host/x.zip?signature={SECRET}", f"https://user:{SECRET}@host:99999/x.zip",
        f"https://user:{SECRET}@host/x.exe?{SECRET}", f"https://user:{SECRET}@ho st/x.zip", f"user:{SECRET}@host/x.zip",
        f"https:/user:{SECRET}@host", f"s3://key:{SECRET}@bucket", f"ftp://user:{SECRET}@host", f"hub://user:{SECRET}@host",
        f"{SECRET}:{SECRET}://x", f"https://[{SECRET}/x.zip",
    ],
)  # fmt: skip
def test_secrets_are_in_no_repr_and_no_error(text: str) -> None:
    with pytest.raises(SourceError) as error:
        probe(parse_source(text), None, Limits(), Settings())
    assert SECRET not in "".join(traceback.format_exception(error.value, limit=0))
    with suppress(SourceError):
        source = parse_source(text)
        assert SECRET in source.text
        assert SECRET not in repr(source) + str(source) + source.shown


def test_an_error_says_whether_trying_again_helps_and_passes_between_processes() -> None:
    assert SourceError("timed_out", "").retry
    assert not SourceError("not_found", "").retry
    again = pickle.loads(pickle.dumps(SourceError("unreachable", "why", retry=False)))  # noqa: S301  # as a pool of processes does
    assert (again.code, again.message, again.retry) == ("unreachable", "why", False)


def test_nothing_is_allowed_that_the_operator_did_not_name(tmp_path: Path) -> None:
    for text in (str(tmp_path), "org/name", "hub://name", "s3://bucket/a", "https://host/x.zip"):
        assert not Allowed().allows(parse_source(text))
        with pytest.raises(SourceError) as error:
            probe(parse_source(text), None, Limits(), Settings())
        assert code_of(error) == "not_listed"


@pytest.mark.parametrize(
    ("listed", "allowed", "refused"),
    [
        ("hub://org", ["org/a", "org/b@v1"], ["org2/a", "Org/a", "hub://org", "x@v1"]),
        ("hub://*", ["org/a", "hub://name"], []),
        ("s3://bucket", ["s3://bucket", "s3://bucket/a"], ["s3://bucket2/a"]),
        ("s3://bucket/team/", ["s3://bucket/team", "s3://bucket/team/a"], ["s3://bucket", "s3://bucket/team2/a"]),
        ("https://host", ["https://host/x.zip", "https://HOST:443/a/x.zip"], ["http://host/x.zip", "https://host:8443/x.zip"]),
        ("https://host", ["https://other@host/x.zip"], ["https://host@other/x.zip", "https://host.other/x.zip", "https://sub.host/x.zip"]),
        ("https://host/a/", ["https://host/a/x.zip", "https://host/%61/x.zip?q"], ["https://host/x.zip", "https://host/ab/x.zip"]),
        ("http://host:80/a.zip", ["http://host/a.zip"], ["http://host/b.zip"]),
    ],
)
def test_places_are_compared_by_their_parts(listed: str, allowed: list[str], refused: list[str]) -> None:
    list_ = parse_allowed([listed])
    assert all(list_.allows(parse_source(text)) for text in allowed)
    assert not any(list_.allows(parse_source(text)) for text in refused)


@pytest.mark.parametrize("text", ["org/name", "hub://", "hub://org/name", "https://u:p@host/", "https://host/?q", "a", "../x"])
def test_a_list_that_says_something_else_is_refused(text: str) -> None:
    with pytest.raises(SourceError) as error:
        parse_allowed([text])
    assert code_of(error) == "invalid"


def test_a_folder_is_fetched_and_probed(tmp_path: Path, into: Path) -> None:
    source = parse_source(str(an_adapter(tmp_path / "all" / "a", b"w" * 1000)))
    settings = allowing(tmp_path / "all")
    fetched = fetch(source, into, None, Limits(), settings)
    assert fetched == Fetched(probe(source, None, Limits(), settings), 1002)
    assert sorted(os.listdir(into)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (into / "adapter_model.safetensors").read_bytes() == b"w" * 1000
    assert (into / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_written_anew_is_another_revision(tmp_path: Path) -> None:
    source = parse_source(str(an_adapter(tmp_path / "a")))
    before = probe(source, None, Limits(), allowing(tmp_path))
    assert probe(source, None, Limits(), allowing(tmp_path)) == before
    os.utime(tmp_path / "a" / "adapter_model.safetensors", ns=(1, 1))
    assert probe(source, None, Limits(), allowing(tmp_path)) != before


def test_links_count_as_what_they_lead_to(tmp_path: Path, into: Path) -> None:
    blobs, snapshot = an_adapter(tmp_path / "all" / "blobs"), tmp_path / "all" / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../blobs/{path.name}")  # as a hub's cache does
    (tmp_path / "current").symlink_to("all")
    fetch(parse_source(str(snapshot)), into, None, Limits(), allowing(tmp_path / "current"))
    assert len(os.listdir(into)) == 2


def test_no_link_leads_out_of_what_is_allowed(tmp_path: Path, into: Path) -> None:
    secret = an_adapter(tmp_path / "secret")
    inside = an_adapter(tmp_path / "all" / "a")
    (tmp_path / "all" / "whole").symlink_to(secret)
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    for folder in (tmp_path / "all" / "whole", inside, secret, tmp_path):
        for ask in (probe, lambda source, *more: fetch(source, into, *more)):
            with pytest.raises(SourceError) as error:
                ask(parse_source(str(folder)), None, Limits(), allowing(tmp_path / "all"))
            assert code_of(error) == "not_listed"
    assert not os.listdir(into)


@pytest.mark.parametrize("what", ["", "adapter_model.safetensors"], ids=["folder", "file"])
def test_what_was_checked_is_what_is_opened(tmp_path: Path, what: str) -> None:
    """Somebody swaps a folder or a file for a link, again and again, while it is read: the secret's size is never seen."""
    secret, outside = an_adapter(tmp_path / "secret", b"s" * 999), tmp_path / "outside"
    folder = an_adapter(tmp_path / "all" / "a", b"harmless")
    outside.symlink_to(secret / what)
    swapped, spare, stop = folder / what, tmp_path / "all" / "spare", threading.Event()

    def swap() -> None:
        while not stop.is_set():
            swapped.rename(spare)
            outside.rename(swapped)
            swapped.rename(outside)
            spare.rename(swapped)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        for _ in range(2000):
            try:
                seen.add(probe(parse_source(str(folder)), None, Limits(), allowing(tmp_path / "all")).split("/")[1].split("-")[0])
            except SourceError as error:
                seen.add(error.code)
    finally:
        stop.set()
        swapper.join()
    assert seen <= {"8", "not_listed", "not_found", "no_safetensors"}


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="no regular file"):
        probe(parse_source(str(folder)), None, Limits(), allowing(tmp_path))
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    with pytest.raises(SourceError, match="no regular file"):
        probe(parse_source(str(folder)), None, Limits(), allowing(tmp_path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SourceError) as error:
        probe(parse_source(str(folder)), None, Limits(), allowing(tmp_path))
    assert code_of(error) == "no_safetensors"
    (folder / "adapter_config.json").unlink()
    for path, text in ((folder, "has no adapter_config.json"), (tmp_path / "b", "is no folder")):
        with pytest.raises(SourceError, match=text) as error:
            probe(parse_source(str(path)), None, Limits(), allowing(tmp_path))
        assert code_of(error) == "not_found"


def test_a_file_above_the_limit_is_not_copied_and_nothing_is_left(tmp_path: Path, into: Path) -> None:
    source = parse_source(str(an_adapter(tmp_path / "a", b"w" * 1001)))
    with pytest.raises(SourceError, match="1001 bytes, more than 1000 bytes") as error:
        fetch(source, into, None, Limits(file_bytes=1000), allowing(tmp_path))
    assert code_of(error) == "too_large"
    assert not os.listdir(into)


def test_a_config_is_no_larger_than_a_page_can_be(tmp_path: Path, into: Path) -> None:
    (an_adapter(tmp_path / "a") / "adapter_config.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(SourceError) as error:
        fetch(parse_source(str(tmp_path / "a")), into, None, Limits(), allowing(tmp_path))
    assert code_of(error) == "too_large"


def test_a_folder_that_cannot_be_written_to_is_said_to_be(tmp_path: Path) -> None:
    source = parse_source(str(an_adapter(tmp_path / "a")))
    with pytest.raises(SourceError) as error:
        fetch(source, tmp_path / "nowhere", None, Limits(), allowing(tmp_path))
    assert code_of(error) == "disk"


def test_a_token_that_would_end_its_line_is_sent_nowhere() -> None:
    with pytest.raises(SourceError) as error:
        probe(parse_source("http://127.0.0.1:1/x.zip"), f"{SECRET}\r\nX: y", Limits(), allowing("http://127.0.0.1:1"))
    assert code_of(error) == "not_allowed"
    assert SECRET not in str(error.value)
