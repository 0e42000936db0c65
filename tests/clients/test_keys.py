"""Keys as a user sees them: made on the command line, used by both clients and by commands, taken away again."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.clients import AsyncClient, Client, Engine, Keys, Stream, launch
from penstock.clients.errors import ConnectionLost, InvalidRequest, Overloaded, Unauthorized

COMMAND = [sys.executable, "-m", "penstock.clients.cli.main"]


def penstock(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an operator makes by hand: the server's pair, users' pairs, and the folder of those who may come in."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "clients").mkdir(mode=0o755)
    assert penstock("keys", "new", "server", folder).returncode == 0
    for name in ("alice", "bob", "mallory"):
        assert f"{name}.key_secret" in penstock("keys", "new", "client", folder, "--name", name).stdout
    for name in ("alice", "bob"):
        shutil.copy(folder / f"{name}.key", folder / "clients")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    more = {"secret_key": str(folder / "server.key_secret"), "client_keys": str(folder / "clients")}
    with Engine("tiny", executor="mock", address=address, lease=1.0, message_rate=100.0, **more) as engine:
        engine.wait(60)
        yield address


def keys_of(folder: Path, name: str) -> Keys:
    return Keys.load(folder / f"{name}.key_secret", folder / "server.key")


def test_both_clients_come_in_with_the_right_key(address: str, folder: Path) -> None:
    with Client(address, keys=keys_of(folder, "alice")) as client:
        assert len(client.generate([1, 2], max_tokens=7).ids) == 7

    async def main() -> int:
        async with AsyncClient(address, keys=keys_of(folder, "bob")) as client:
            return len((await client.generate([1, 2], max_tokens=7)).ids)

    assert asyncio.run(main()) == 7


def test_a_key_that_is_not_known_is_a_typed_error_at_once(address: str, folder: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(Unauthorized):
        Client(address, keys=keys_of(folder, "mallory"), connect_timeout=30).open()
    with pytest.raises(Unauthorized):
        asyncio.run(AsyncClient(address, keys=keys_of(folder, "mallory"), connect_timeout=30).open())
    assert time.monotonic() - begun < 10


def test_without_a_key_or_with_another_servers_nobody_answers(address: str, folder: Path) -> None:
    mine = keys_of(folder, "alice")
    for keys in (None, Keys(keys_of(folder, "bob").public, mine.public, mine.secret)):
        with pytest.raises(ConnectionLost):
            Client(address, keys=keys, connect_timeout=0.5).open()


def test_a_stream_whose_key_is_revoked_ends_with_a_typed_error(address: str, folder: Path) -> None:
    with Client(address, keys=keys_of(folder, "bob")) as client:
        stream = iter(client.stream([1, 2], max_tokens=32_000, n=16))
        assert next(stream).ids
        (folder / "clients" / "bob.key").unlink()
        with pytest.raises(Unauthorized):
            for _ in stream:
                pass
    shutil.copy(folder / "bob.key", folder / "clients")
    with Client(address, keys=keys_of(folder, "bob")) as client:
        assert client.requests() == []


def test_another_tenant_than_the_user_is_refused(address: str, folder: Path) -> None:
    with Client(address, keys=keys_of(folder, "alice"), tenant="bob") as client, pytest.raises(InvalidRequest) as caught:
        client.generate([1], max_tokens=1)
    assert (caught.value.field, caught.value.limit) == ("tenant", "alice")


def test_a_flood_is_refused_with_a_time_to_come_back_and_map_comes_back(address: str, folder: Path) -> None:
    with Client(address, keys=keys_of(folder, "alice")) as client:
        streams = [client.stream([index + 1], max_tokens=1) for index in range(600)]
        refused = [stream for stream in streams if _overloaded(stream)]
        assert 0 < len(refused) < 300
        # Who comes back when it was told to is served.
        outcomes = list(client.map([[index + 1] for index in range(500)], concurrency=500, max_tokens=1))
    assert {len(outcome.unwrap().ids) for outcome in outcomes} == {1}


def _overloaded(stream: Stream) -> bool:
    try:
        stream.completion()
    except Overloaded as error:
        return bool(error.retry_after)
    return False


def test_commands_take_keys(address: str, folder: Path) -> None:
    given = ("--address", address, "--key", folder / "alice.key_secret", "--server-key", keys_of(folder, "bob").server)
    assert json.loads(penstock("status", "--json", *given).stdout)["state"] == "ready"
    assert penstock("generate", "Hello", "--max-tokens", "3", *given).returncode == 0
    half = penstock("status", "--address", address, "--key", folder / "alice.key_secret")
    assert (half.returncode, "both --key and --server-key" in half.stderr) == (2, True)
    given = ("--address", address, "--key", folder / "mallory.key_secret", "--server-key", folder / "server.key", "--timeout", "30")
    unknown = penstock("status", *given)
    assert (unknown.returncode, "does not take this client's key" in unknown.stderr) == (1, True), unknown.stderr


def test_launch_takes_keys(folder: Path) -> None:
    more = {"secret_key": str(folder / "server.key_secret"), "client_keys": str(folder / "clients")}
    with launch(executor="mock", keys=keys_of(folder, "alice"), **more) as client:
        assert len(client.generate([1, 2], max_tokens=3).ids) == 3


def test_what_is_no_key_is_said_without_showing_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="secret") as caught:
        Keys("a" * 40, "b" * 40, "hunter2")
    assert "hunter2" not in str(caught.value)
    keys = keys_of(folder, "alice")
    assert keys.secret not in repr(keys)
    (tmp_path / "open.key_secret").write_text((folder / "alice.key_secret").read_text())
    (tmp_path / "open.key_secret").chmod(0o640)
    for path in (tmp_path / "open.key_secret", tmp_path / "nowhere", folder / "alice.key"):
        with pytest.raises(InvalidRequest, match=path.name):
            Keys.load(path, folder / "server.key")
    assert penstock("keys", "new", "client", folder, "--name", "alice").returncode == 2
    assert penstock("keys", "new", "client", folder, "--name", "../x").returncode == 2
