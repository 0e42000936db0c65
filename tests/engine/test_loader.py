"""The thread that brings adapters to their pages, and files that are not what they should be."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from penstock.engine.lora import host
from penstock.engine.lora.adapters import Adapters
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.host import HostPages
from penstock.engine.lora.layout import Bytes, PageLayout, PagePool, Site
from penstock.engine.lora.loader import AdapterLoader
from penstock.engine.lora.read import Lora
from penstock.engine.lora.store import PageFile, read_pages, write_pages

from .laying import lay_out

LAYOUT = PageLayout([(Site("q", 32, 48), Site("k", 32, 16)), (Site("o", 48, 32),)])
OTHER = PageLayout([(Site("q", 32, 64),)])
PAGES = 4


class Fake(Adapters):
    """Pages without a model."""

    def __init__(self, layout: PageLayout = LAYOUT) -> None:
        self.layout, self.pool = layout, PagePool(layout, PAGES, torch.float32, torch.device("cpu"))


@pytest.fixture(params=[None, 0, 1 << 20], ids=["direct", "one page", "host pages"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterLoader]:
    """By the way of a CPU, and by that of a device: without its streams, and in small pieces."""
    monkeypatch.setattr(host, "PIECE", 4096)
    pages = None if request.param is None else HostPages(LAYOUT.elements, torch.float32, request.param, pinned=False)
    loader = AdapterLoader(Fake(), pages)
    yield loader
    loader.close()


def load(loader: AdapterLoader, path: Path, *pages: int) -> str | None:
    told: SimpleQueue[str | None] = SimpleQueue()
    loader.load(str(path), pages, told.put)
    return told.get(timeout=10)


def write(path: Path, layout: PageLayout, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    weights = {site.name: (torch.randn(rank, site.in_features), torch.randn(site.out_features, rank)) for site in layout.sites}
    lora = Lora(weights, dict.fromkeys(weights, 0.3), "")
    write_pages(path, layout, lora, dtype)
    return lay_out(layout, lora.weights, dtype, lora.scales)


@pytest.mark.parametrize("most", [1 << 20, 1000], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pages_are_written_in_whatever_parts_the_disk_takes_them(
    dtype: torch.dtype, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: pwrite(file, content[:most], at))
    data, used = write(tmp_path / "good", LAYOUT, 20, dtype)
    got = read_pages(tmp_path / "good")
    assert torch.equal(got[0], data)
    assert torch.equal(got[1], used)


@pytest.mark.parametrize("most", [1 << 20, 1000], ids=["whole", "in parts"])
def test_a_page_is_read_in_whatever_parts_the_disk_gives_them(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def some(file: int, into: list[memoryview], at: int) -> int:
        first = into[0][:most]
        return preadv(file, [first] if len(first) < len(into[0]) else into, at)

    monkeypatch.setattr(os, "preadv", some)
    data, _ = write(tmp_path / "good", LAYOUT, 20)
    bytes_of = data.view(torch.uint8).flatten().numpy()
    parts = [np.zeros(size, np.uint8) for size in (3000, 0, 64, 2500)]
    file = PageFile(tmp_path / "good")
    file.read(parts, 1234)
    assert np.array_equal(np.concatenate(parts), bytes_of[1234 : 1234 + 5564])
    os.truncate(tmp_path / "good", 5000)
    with pytest.raises(AdapterError, match="it ends after") as caught:
        file.read(parts, 1234)
    file.close()
    assert caught.value.code == "broken_adapter"


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}"], ids=range(5))
def test_a_file_without_a_header_is_broken_and_does_not_stay_open(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterError) as caught:
        PageFile(tmp_path / "bad")
    assert len(os.listdir("/proc/self/fd")) == before, "while the error is still held"
    assert caught.value.code == "broken_adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_are_read_from_where_they_lie(dtype: torch.dtype, tmp_path: Path) -> None:
    data, used = write(tmp_path / "good", LAYOUT, 20, dtype)
    save_file({"data": data, "used": used}, tmp_path / "older")  # by the size of their elements
    for name in ("good", "older"):
        got = np.zeros(data.nbytes, np.uint8)
        with closing(PageFile(tmp_path / name)) as file:
            file.read([got], 0)
        assert np.array_equal(got, data.view(torch.uint8).flatten().numpy()), name


def test_an_adapter_comes_to_its_pages(loader: AdapterLoader, tmp_path: Path) -> None:
    data, used = write(tmp_path / "good", LAYOUT, 20)
    assert load(loader, tmp_path / "good", 3, 1) is None
    pool = loader._adapters.pool
    assert torch.equal(pool.data[[3, 1]], data)
    assert torch.equal(pool.used[[3, 1]], used)
    assert not pool.used[[0, 2]].any()


def test_one_that_comes_again_and_again_comes_from_host_memory(loader: AdapterLoader, tmp_path: Path) -> None:
    data, used = write(tmp_path / "good", LAYOUT, 20)
    other, _ = write(tmp_path / "other", LAYOUT, 32)
    pool = loader._adapters.pool
    for pages in ((0, 1), (2, 3), (1, 0)):
        pool.data.fill_(float("nan"))
        assert load(loader, tmp_path / "good", *pages) is None
        assert torch.equal(pool.data[list(pages)], data)
        assert load(loader, tmp_path / "other", *pages) is None
        assert torch.equal(pool.data[list(pages)], other)
    (tmp_path / "good").unlink()
    error = load(loader, tmp_path / "good", 3, 2)
    if loader.host is None or not loader.host.most:
        assert error is not None
    else:
        assert error is None
        assert torch.equal(pool.data[[3, 2]], data)
        assert torch.equal(pool.used[[3, 2]], used)


@pytest.mark.parametrize(
    ("layout", "rank", "dtype"), [(LAYOUT, 16, torch.float32), (OTHER, 20, torch.float32), (LAYOUT, 20, torch.float16)],
    ids=["fewer pages", "another model", "another dtype"],
)  # fmt: skip
def test_a_file_of_another_kind_is_removed_and_the_next_one_is_loaded(
    loader: AdapterLoader, tmp_path: Path, layout: PageLayout, rank: int, dtype: torch.dtype
) -> None:
    write(tmp_path / "bad", layout, rank, dtype)
    data, _ = write(tmp_path / "good", LAYOUT, 20)
    error = load(loader, tmp_path / "bad", 0, 1)
    assert error is not None
    assert "expected" in error
    assert not (tmp_path / "bad").exists()
    assert load(loader, tmp_path / "good", 0, 1) is None
    assert torch.equal(loader._adapters.pool.data[[0, 1]], data)


def test_whoever_waits_hears_of_what_nobody_thought_of(loader: AdapterLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "good", LAYOUT, 20)
    with monkeypatch.context() as patch:
        patch.setattr(Fake, "check", lambda *_: 1 / 0)
        error = load(loader, tmp_path / "good", 0, 1)
    assert error is not None
    assert "ZeroDivisionError" in error
    assert load(loader, tmp_path / "good", 0, 1) is None, "it is no fault of the file's"
    assert load(loader, tmp_path / "not there", 2, 3) is not None


@pytest.mark.parametrize(
    ("where", "call", "number"),
    [(safetensors, "safe_open", errno.ENOENT), (Path, "open", errno.EMFILE), (os, "preadv", errno.EIO)],  # the first says so of any reason
    ids=["mapped", "opened", "read"],
)
def test_a_file_stays_that_cannot_be_read_now(
    loader: AdapterLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, call: str, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    data, _ = write(tmp_path / "good", LAYOUT, 20)
    with monkeypatch.context() as patch:
        patch.setattr(where, call, refuse)
        error = load(loader, tmp_path / "good", 0, 1)
    assert (error or "").startswith("OSError") or (loader.host is None and where is not safetensors)
    assert load(loader, tmp_path / "good", 0, 1) is None
    assert torch.equal(loader._adapters.pool.data[[0, 1]], data)


def test_the_thread_goes_on_without_memory_and_without_a_disk_to_write_to(
    loader: AdapterLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: write(tmp_path / name, LAYOUT, 20)[0] for name in ("one", "two", "three")}
    write(tmp_path / "bad", OTHER, 20)
    prepare, calls = HostPages.prepare, []

    def once(pages: HostPages) -> None:
        if not pages._free:
            calls.append(pages)
            if len(calls) > 1:
                raise RuntimeError("no memory can be locked")
            prepare(pages)

    def refuse(_: Path, **__: bool) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(HostPages, "prepare", once)
    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(3):
        for name, data in contents.items():
            assert load(loader, tmp_path / name, 2, 0) is None
            assert torch.equal(loader._adapters.pool.data[[2, 0]], data)
        assert load(loader, tmp_path / "bad", 2, 0) is not None


class Disk:
    """Reads that wait for a gate, but for the first one, which fails; a file's end is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.events = threading.Event(), list[str]()
        read, close = PageFile.read, PageFile.close

        def slow(file: PageFile, into: Sequence[Bytes], at: int) -> None:
            if not at:
                raise OSError(errno.EIO, "the first one fails")
            self.gate.wait(10)
            read(file, into, at)
            self.events.append("read")

        def note(file: PageFile) -> None:
            self.events.append("closed")
            close(file)

        monkeypatch.setattr(PageFile, "read", slow)
        monkeypatch.setattr(PageFile, "close", note)


def many_pieces(monkeypatch: pytest.MonkeyPatch, path: Path) -> AdapterLoader:
    monkeypatch.setattr(host, "PIECE", 1024)
    write(path, LAYOUT, 20)
    return AdapterLoader(Fake(), HostPages(LAYOUT.elements, torch.float32, 0, pinned=False))


def test_a_file_is_not_closed_before_the_slowest_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, disk, told = many_pieces(monkeypatch, tmp_path / "good"), Disk(monkeypatch), SimpleQueue[str | None]()
    loader.load(str(tmp_path / "good"), (0, 1), told.put)
    time.sleep(0.1)
    assert not disk.events
    disk.gate.set()
    assert "the first one fails" in (told.get(timeout=10) or "")
    assert disk.events == ["read"] * 3 + ["closed"]
    assert (tmp_path / "good").exists()
    loader.close()


def test_those_that_read_are_waited_for_when_no_more_can_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, disk, told = many_pieces(monkeypatch, tmp_path / "good"), Disk(monkeypatch), SimpleQueue[str | None]()
    submit, begun = loader._readers.submit, list[Any]()

    def some(*what: Any) -> Any:
        if len(begun) == 2:
            raise RuntimeError("no more threads")
        begun.append(what)
        return submit(*what)

    monkeypatch.setattr(loader._readers, "submit", some)
    loader.load(str(tmp_path / "good"), (0, 1), told.put)
    time.sleep(0.1)
    assert not disk.events
    disk.gate.set()
    assert "no more threads" in (told.get(timeout=10) or "")
    assert disk.events == ["read", "closed"]
    loader.close()


def test_whoever_loads_ends_when_a_slow_disk_has_answered_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, disk, told = many_pieces(monkeypatch, tmp_path / "good"), Disk(monkeypatch), SimpleQueue[str | None]()
    monkeypatch.setattr(loader._readers, "_max_workers", 1)  # so that some wait for one that reads
    monkeypatch.setattr(loader._thread, "join", lambda timeout: None)  # it is too late for whoever closes it
    loader.load(str(tmp_path / "good"), (0, 1), told.put)
    time.sleep(0.1)
    loader.close()
    disk.gate.set()
    assert told.get(timeout=10) is not None


def test_the_thread_that_loads_begins_no_team_of_others(tmp_path: Path) -> None:
    """More of OpenMP's threads than cores do not wait awake any more: whoever computes would be slower for ever."""
    layout = PageLayout([(Site("q", 4096, 4096),)])
    loader, before = AdapterLoader(Fake(layout), None), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write(tmp_path / "good", layout, 20)
        threads = len(os.listdir("/proc/self/task"))
        assert load(loader, tmp_path / "good", 0, 1) is None
        assert len(os.listdir("/proc/self/task")) == threads
    finally:
        torch.set_num_threads(before)
        loader.close()
