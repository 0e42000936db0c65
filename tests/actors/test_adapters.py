"""Adapters in a whole engine: who asks for one gets it, and what is wrong with one is nobody else's affair."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from penstock.clients import Client, Engine
from penstock.clients.errors import AdapterError, DigestMismatch, InvalidRequest, PenstockError, UnknownAdapter
from penstock.engine.open import TINY

from .adapting import LAYERS, PROMPT, expected, write_adapter

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
TOKENS = 24


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that adapters may come from."""
    return tmp_path_factory.mktemp("shop")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of adapters that are ready."""
    return tmp_path_factory.mktemp("cache")


class Vault(ThreadingHTTPServer):
    """A web server with an archive for those who have the token; what the token is may change."""

    def __init__(self, folder: Path) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
        self.archive, self.token, self.asked = packed.getvalue(), "open-sesame", 0
        super().__init__(("127.0.0.1", 0), Keeper)
        self.url = f"http://127.0.0.1:{self.server_port}/private.zip"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Keeper(BaseHTTPRequestHandler):
    server: Vault

    def do_GET(self) -> None:
        self.server.asked += 1
        allowed = self.headers["Authorization"] == f"Bearer {self.server.token}"
        body = self.server.archive if allowed else b"no"
        self.send_response(200 if allowed else 403)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # a probe does not read all of it
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    folder = tmp_path_factory.mktemp("vault") / "adapter"
    with Vault(write_adapter(folder, 60)) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def running(shop: Path, cache: Path, vault: Vault) -> Iterator[Engine]:
    named = {name: write_adapter(shop / name, seed, rank) for name, seed, rank in (("red", 1, 4), ("green", 2, 16), ("blue", 3, 33))}
    adapters = tuple(f"{name}={folder}" for name, folder in named.items())
    with Engine("tiny", adapters=adapters, adapter_sources=(str(shop), vault.url), adapter_pages=8, adapter_cache=str(cache)) as engine:
        engine.wait(60)
        yield engine


@pytest.fixture
def client(running: Engine) -> Iterator[Client]:
    with Client(running.address) as one:
        yield one


def says(client: Client, adapter: Any, tokens: int = TOKENS, **more: Any) -> list[int]:
    return client.generate(PROMPT, adapter=adapter, max_tokens=tokens, **GREEDY, **more).ids


def row(client: Client, name: str) -> dict[str, Any]:
    return next(one for one in client.adapters() if one["name"] == name)


def pid_of(client: Client, kind: str) -> int:
    return int(next(one["pid"] for one in client.status()["actors"] if one["kind"] == kind))


def test_everyone_in_a_batch_gets_what_peft_says(client: Client, shop: Path) -> None:
    names = [None, "red", "green", "blue"]
    streams = [(name, client.stream(PROMPT, adapter=name, max_tokens=TOKENS, **GREEDY)) for name in names * 4]
    wanted = {name: expected(None if name is None else shop / name, TOKENS) for name in names}
    assert [(name, stream.completion().ids) for name, stream in streams] == [(name, wanted[name]) for name, _ in streams]
    assert len({tuple(ids) for ids in wanted.values()}) == len(names)


def test_adapters_that_lie_beside_the_model_are_known(client: Client) -> None:
    names = {one["name"] for one in client.adapters()}
    assert {"shout", "python", "list", "red", "green", "blue"} <= names
    assert says(client, "shout") != says(client, None)


def test_what_is_not_known_says_what_is(client: Client) -> None:
    with pytest.raises(UnknownAdapter, match="'nobody'") as caught:
        says(client, "nobody")
    assert "blue, green" in (caught.value.limit or "")


def broken(folder: Path, what: str) -> Path:
    """An adapter with something wrong."""
    write_adapter(folder, seed=9, rank=4)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values = json.loads(config.read_text())
    match what:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "rubbish":
            weights.write_bytes(b"\xff" * 5000)
        case "pickled":
            weights.rename(folder / "adapter_model.bin")
        case "no config":
            config.unlink()
        case "not json":
            config.write_text("{")
        case "dora":
            config.write_text(json.dumps(values | {"use_dora": True}))
        case "another rank":
            config.write_text(json.dumps(values | {"r": 8}))
        case "another model":
            write_adapter(folder, 9, modules=("q_proj",))
            shutil.copy(weights, folder / "kept")
            config.write_text(json.dumps(values | {"target_modules": ["q_proj", "w1"]}))
        case "too large":
            write_adapter(folder, 9, rank=16 * 5)
    return folder


@pytest.mark.parametrize(
    ("what", "limit", "text"),
    [
        ("truncated", "broken_adapter", "{}/adapter_model.safetensors: "),
        ("rubbish", "broken_adapter", "{}/adapter_model.safetensors: "),
        ("pickled", "no_safetensors", "{} has no adapter_model.safetensors"),
        ("no config", "not_found", "{} has no adapter_config.json"),
        ("not json", "broken_adapter", "{}/adapter_config.json: "),
        ("dora", "unsupported_adapter", "{}/adapter_config.json: use_dora=True"),
        ("another rank", "broken_adapter", "{}/adapter_model.safetensors: ranks are not those"),
        ("too large", "4 pages", "the adapter takes 5 pages"),
    ],
)
def test_a_broken_adapter_fails_its_own_request(client: Client, shop: Path, cache: Path, what: str, limit: str, text: str) -> None:
    folder, mine = broken(shop / f"bad {what}", what), says(client, "red")
    ready = set(cache.rglob("*.safetensors"))
    other = client.stream(PROMPT, adapter="red", max_tokens=TOKENS, **GREEDY)
    with pytest.raises(AdapterError) as caught:
        says(client, str(folder))
    assert caught.value.limit == limit
    assert str(cache) not in str(caught.value)
    assert text.format(folder) in str(caught.value)
    assert set(cache.rglob("*.safetensors")) == ready
    assert other.completion().ids == mine


def test_an_adapter_of_another_model_says_what_is_not_there(client: Client, shop: Path) -> None:
    folder = write_adapter(shop / "other", 9)
    text = (folder / "adapter_model.safetensors").read_bytes().replace(b"self_attn.q_proj", b"self_attn.x_proj")
    (folder / "adapter_model.safetensors").write_bytes(text)
    with pytest.raises(AdapterError, match=rf"layers\.0\.self_attn\.x_proj.* and {LAYERS - 5} more") as caught:
        says(client, str(folder))
    assert caught.value.limit == "wrong_base_model"


@pytest.mark.parametrize("source", ["/etc", "hub://some/one", "s3://bucket/prefix", "https://example.com/a.zip", "./shop"])
def test_sources_that_are_not_allowed_are_not_touched(client: Client, source: str) -> None:
    with pytest.raises(AdapterError, match="allows") as caught:
        says(client, source)
    assert caught.value.limit == "not_listed"
    with pytest.raises(AdapterError, match="allows"):
        client.load_adapter("mine", source)


@pytest.mark.parametrize(
    ("adapter", "field"),
    [
        ({"merge": []}, "adapter.merge"), ({"merge": ["red"], "weights": [1.0, 2.0]}, "adapter.weights"),
        ({"name": "red", "x": 1}, "adapter"),
        ({"merge": ["red"], "method": "sum"}, "method"), ({"merge": ["red", "red"], "method": "ties", "density": 0.0}, "density"),
    ],
)  # fmt: skip
def test_a_wish_that_is_none_is_refused_before_it_is_sent(client: Client, adapter: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        says(client, adapter)
    assert caught.value.field == field


def test_a_name_may_be_given_to_something_new_while_streams_go_on_with_the_old(client: Client, shop: Path) -> None:
    write_adapter(shop / "first", 20)
    write_adapter(shop / "second", 21)
    first = client.load_adapter("changing", str(shop / "first"))
    old = client.stream(PROMPT, adapter="changing", max_tokens=200, **GREEDY)
    reading = iter(old)
    begun = next(reading)
    second = client.load_adapter("changing", str(shop / "second"))
    assert first["digest"] != second["digest"] == row(client, "changing")["digest"]
    new = client.generate(PROMPT, adapter="changing", max_tokens=TOKENS, **GREEDY)
    assert new.ids == expected(shop / "second", TOKENS)
    assert new.usage.cached_tokens == 0
    assert old.completion().ids == expected(shop / "first", 200)
    assert begun.ids
    client.unload_adapter("changing")
    with pytest.raises(UnknownAdapter):
        says(client, "changing")
    with pytest.raises(UnknownAdapter):
        client.unload_adapter("changing")


def test_what_is_at_a_source_is_read_again_when_it_is_loaded_again(client: Client, shop: Path) -> None:
    folder = write_adapter(shop / "edited", 30)
    before = client.load_adapter("edited", str(folder))
    assert client.load_adapter("edited")["digest"] == before["digest"]
    write_adapter(folder, 31)
    assert says(client, "edited") != expected(folder, TOKENS)
    assert client.load_adapter("edited")["digest"] != before["digest"]
    assert says(client, "edited") == expected(folder, TOKENS)
    client.unload_adapter("edited")


def test_prefixes_are_shared_with_the_same_adapter_only(client: Client) -> None:
    prompt = list(range(100, 180))

    def cached(adapter: str | None) -> int:
        return client.generate(prompt, adapter=adapter, max_tokens=1, **GREEDY).usage.cached_tokens

    assert [cached("red"), cached("red"), cached("green"), cached(None), cached("green")] == [0, 64, 0, 0, 64]


def test_a_private_adapter_is_for_those_with_its_token_and_that_is_asked_each_time(client: Client, vault: Vault) -> None:
    mine = says(client, vault.url, adapter_token="open-sesame")
    assert mine != says(client, None)
    for token in (None, "a-guess"):  # although it is there
        with pytest.raises(AdapterError) as caught:
            says(client, vault.url, adapter_token=token)
        assert caught.value.limit == "not_allowed"
        assert "sesame" not in str(caught.value)
    before = vault.asked
    assert says(client, vault.url, adapter_token="open-sesame") == mine
    assert vault.asked == before + 1  # a byte, and not all of it
    vault.token = "another"
    with pytest.raises(AdapterError):
        says(client, vault.url, adapter_token="open-sesame")
    stream = client.stream(PROMPT, adapter=vault.url, adapter_token="another", max_tokens=TOKENS, **GREEDY)
    assert "another" not in json.dumps(stream.save())
    assert stream.completion().ids == mine


def test_two_adapters_may_be_merged_for_a_request(client: Client, shop: Path) -> None:
    write_adapter(shop / "twin", 40, rank=4)
    both = says(client, {"merge": ["red", str(shop / "twin")], "weights": [0.5, 0.5]})
    assert both not in (says(client, "red"), says(client, str(shop / "twin")))
    assert both == says(client, {"merge": ["red", str(shop / "twin")], "weights": [0.5, 0.5], "method": "linear"})
    assert says(client, {"merge": ["red", str(shop / "twin")], "weights": [1.0, 0.0]}) == says(client, "red")
    with pytest.raises(AdapterError, match=r"different ranks \(4, 16\)"):
        says(client, {"merge": ["red", "green"]})


def test_a_merge_is_of_what_a_name_stands_for(client: Client, shop: Path) -> None:
    wish = {"merge": ["edited", "red"], "weights": [1.0, 0.0]}
    write_adapter(shop / "edited", 45)
    client.load_adapter("edited", str(shop / "edited"))
    assert says(client, wish) == expected(shop / "edited", TOKENS)
    write_adapter(shop / "edited", 46)
    client.load_adapter("edited")
    assert says(client, wish) == expected(shop / "edited", TOKENS)
    write_adapter(shop / "edited", 47)  # which nobody has loaded
    with pytest.raises(AdapterError, match="from there, and a merge is made of what is there: load it again") as caught:
        says(client, {**wish, "weights": [0.5, 0.0]})
    assert caught.value.limit == "changed_adapter"
    client.unload_adapter("edited")


def test_a_token_is_for_one_place(client: Client, vault: Vault) -> None:
    before = vault.asked
    elsewhere = vault.url.replace("127.0.0.1", "localhost")
    with pytest.raises(InvalidRequest, match="several places"):
        says(client, {"merge": [vault.url, elsewhere]}, adapter_token="open-sesame")
    assert vault.asked == before
    assert says(client, {"merge": [vault.url]}, adapter_token=vault.token)


def test_more_adapters_than_fit_are_all_served(client: Client, shop: Path) -> None:
    folders = [write_adapter(shop / f"many{number}", 50 + number, rank=16 * (1 + number % 3)) for number in range(6)]  # 12 pages, of 8
    streams = [client.stream(PROMPT, adapter=str(folder), max_tokens=TOKENS, **GREEDY) for folder in folders * 2]
    got = [stream.completion().ids for stream in streams]
    assert got[:6] == got[6:] == [expected(folder, TOKENS) for folder in folders]
    assert client.status()["scheduler"]["adapter_loads"] > 6


def test_what_is_pinned_stays_and_no_more_can_be_than_leaves_room(client: Client, shop: Path) -> None:
    assert client.pin_adapter("red")["pinned"]
    assert client.pin_adapter("blue")["pages"] == 3  # and with the other one four, of four that may be
    with pytest.raises(InvalidRequest, match="pinned") as caught:
        client.pin_adapter("green")
    assert caught.value.limit == "4 pages"
    client.restart("adapters")  # what is pinned is known to its successor
    client.restart("executor")  # and to that of the scheduler's
    end = time.monotonic() + 20
    while not all(row(client, name).get("state") == "resident" for name in ("red", "blue")):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert row(client, "red")["pinned"]
    with pytest.raises(InvalidRequest, match="pinned"):
        client.load_adapter("red", str(write_adapter(shop / "too much", 97, rank=64)))
    assert says(client, "red") == expected(shop / "red", TOKENS)
    for name in ("red", "blue", "green"):
        assert not client.pin_adapter(name, pinned=False)["pinned"]


def test_a_stream_is_saved_and_carried_on_with_the_same_adapter_only(client: Client, shop: Path) -> None:
    write_adapter(shop / "moving", 70)
    client.load_adapter("moving", str(shop / "moving"))
    whole = says(client, "moving", tokens=400)  # so long that it is not over before it is cancelled
    stream = client.stream(PROMPT, adapter="moving", max_tokens=400, **GREEDY)
    reading = iter(stream)
    taken = [id for chunk in (next(reading), next(reading)) for id in chunk.ids]
    saved = stream.save()
    stream.cancel()
    assert stream.completion().finish_reason == "cancelled"
    assert client.resume(saved).completion().ids == whole
    assert taken == whole[: len(taken)]
    write_adapter(shop / "moving", 71)
    client.load_adapter("moving")
    assert client.resume(saved).completion().ids == whole  # it is known what the name stood for
    client.unload_adapter("moving")
    client.load_adapter("moving", str(shop / "moving"))
    with pytest.raises(DigestMismatch, match="another adapter"):
        client.resume(saved).completion()
    client.unload_adapter("moving")


@pytest.mark.parametrize("kind", ["adapters", "executor", "scheduler", "gateway"])
def test_streams_with_adapters_survive_the_death_of(kind: str, client: Client, shop: Path) -> None:
    fresh = write_adapter(shop / f"fresh {kind}", 80)
    wanted = {name: says(client, name, tokens=80) for name in (None, "red", "green", "blue")}
    streams = [(name, client.stream(PROMPT, adapter=name, max_tokens=80, **GREEDY)) for name in list(wanted) * 2]
    reading = iter(streams[-1][1])
    next(reading)
    asked = client.stream(PROMPT, adapter=str(fresh), max_tokens=TOKENS, **GREEDY)
    os.kill(pid_of(client, kind), signal.SIGKILL)
    late = client.stream(PROMPT, adapter="red", max_tokens=80, **GREEDY)
    assert [stream.completion().ids for _, stream in streams] == [wanted[name] for name, _ in streams]
    assert late.completion().ids == wanted["red"]
    assert asked.completion().ids == expected(fresh, TOKENS)


def test_names_survive_the_actor_that_keeps_them(client: Client, shop: Path) -> None:
    client.load_adapter("kept", str(write_adapter(shop / "kept", 90)))
    client.restart("adapters")
    assert row(client, "kept")["source"] == str(shop / "kept")
    assert says(client, "kept") == expected(shop / "kept", TOKENS)
    client.unload_adapter("kept")


def test_an_adapter_that_somebody_tidied_away_is_made_ready_again(client: Client, cache: Path) -> None:
    whole = says(client, "green", tokens=200)
    stream = client.stream(PROMPT, adapter="green", max_tokens=200, **GREEDY)
    reading = iter(stream)
    next(reading)
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    client.restart("executor")  # its successor finds nothing on disk
    assert stream.completion().ids == whole


def test_a_ready_file_that_is_broken_is_made_again(client: Client, cache: Path) -> None:
    whole = says(client, "green")
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    client.restart("executor")
    assert says(client, "green") == whole


def test_a_stream_goes_on_with_what_its_name_stood_for_although_the_gateway_dies(client: Client, shop: Path) -> None:
    write_adapter(shop / "before", 95)
    write_adapter(shop / "after", 96)
    client.load_adapter("renamed", str(shop / "before"))
    stream = client.stream(PROMPT, adapter="renamed", max_tokens=120, **GREEDY)
    reading = iter(stream)
    next(reading)
    client.load_adapter("renamed", str(shop / "after"))
    os.kill(pid_of(client, "gateway"), signal.SIGKILL)
    assert stream.completion().ids == expected(shop / "before", 120)
    assert says(client, "renamed") == expected(shop / "after", TOKENS)
    client.unload_adapter("renamed")


def test_adapters_beside_a_model_are_known_wherever_the_path_to_it_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "model").symlink_to(TINY)
    monkeypatch.chdir(tmp_path / "here")
    with Engine("../model") as engine:
        engine.wait(60)
        with Client(engine.address) as client:
            assert {one["name"] for one in client.adapters()} == {"shout", "python", "list"}
            assert says(client, "shout") != says(client, None)


def test_without_adapters_an_engine_says_so(tmp_path: Path) -> None:
    with Engine("tiny", adapter_pages=0) as engine:
        engine.wait(60)
        with Client(engine.address) as client:
            with pytest.raises(UnknownAdapter, match="serves none"):
                says(client, "shout")
            with pytest.raises(PenstockError, match="serves no adapters"):
                client.adapters()
            assert {one["kind"] for one in client.status()["actors"]} == {"gateway", "scheduler", "executor", "tokenizer", "detokenizer"}
