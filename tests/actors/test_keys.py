"""Keys: who gets in over real TCP, who does not, and what users who know everything of each other can do to each other."""

import errno
import os
import resource
import shutil
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.auth import load_certificate

from penstock.actors.config import EngineConfig
from penstock.actors.door import LOOK_EVERY_S, Door
from penstock.actors.errors import Refusal
from penstock.actors.keys import UNSETTLED_S, KeyFolder, is_key, new_pair, read_pair, read_public
from penstock.actors.protocol import Accepted, Cancel, Chunks, Goodbye, Hello, List, Listing, Renew
from penstock.actors.reception import Reception
from penstock.clients.errors import PenstockError
from penstock.clients.launcher import Engine


def ids(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Keys:
    """Pairs by name, made as they are asked for, and the engine's folder of those who may come in."""

    def __init__(self, root: Path) -> None:
        self.root, self.clients = root, root / "clients"
        self.clients.mkdir(mode=0o755)
        self.server = read_pair(new_pair(root, "server")[1])

    def make(self, name: str) -> Path:
        if not (self.root / f"{name}.key").exists():
            new_pair(self.root, name)
        return self.root / f"{name}.key"

    def let_in(self, *names: str) -> None:
        for name in names:
            shutil.copy(self.make(name), self.clients)

    def revoke(self, name: str) -> None:
        (self.clients / f"{name}.key").unlink()

    @property
    def config(self) -> dict[str, str]:
        return {"secret_key": str(self.root / "server.key_secret"), "client_keys": str(self.clients)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def guarded(keys: Keys) -> Iterator[Engine]:
    keys.let_in("alice", "bob")
    address = f"tcp://127.0.0.1:{free_port()}"
    with Engine("tiny", executor="mock", address=address, max_open=256, max_open_per_client=40, lease=5.0, **keys.config) as running:
        running.wait(60)
        yield running


@pytest.fixture
def enter(guarded: Engine, keys: Keys, connect: Callable[..., Any]) -> Callable[..., Any]:
    """A bare client with the key of a name, let in or not."""

    def make(name: str | None, *, server: str | None = None, routing_id: bytes | None = None, **more: Any) -> Any:
        def prepare(socket: Any) -> None:
            if routing_id != b"":  # else the library gives it one
                socket.setsockopt(zmq.ROUTING_ID, routing_id or os.urandom(16))
            if name is not None:
                pair = read_pair(keys.make(name).with_suffix(".key_secret"))
                socket.curve_serverkey = (server or keys.server.public).encode()
                socket.curve_publickey, socket.curve_secretkey = pair.public.encode(), pair.secret.encode()

        return connect(guarded.address, prepare=prepare, **more)

    return make


def hears_nothing(raw: Any, seconds: float = 1.0) -> bool:
    return not raw.socket.poll(int(1000 * seconds))


def test_a_client_whose_key_lies_in_the_folder_is_served(enter: Callable[..., Any]) -> None:
    alice = enter("alice")
    alice.hello()
    alice.generate("r", ids=ids(1, 2), params={"max_tokens": 9})
    assert alice.wait(Accepted).resolved["tenant"] == "alice"
    assert alice.done("r")["generated_tokens"] == 9


def test_a_client_without_a_key_with_an_unknown_one_or_of_another_server_gets_nothing(enter: Callable[..., Any], keys: Keys) -> None:
    other = zmq.curve_keypair()[0].decode()
    strangers = [enter(None), enter("mallory"), enter("alice", server=other)]
    for stranger in strangers:
        stranger.send(Hello("c", "stranger"))
        stranger.status_sent()
    assert all(hears_nothing(stranger, 0.5) for stranger in strangers)


def test_keys_come_and_go_without_a_restart(enter: Callable[..., Any], keys: Keys) -> None:
    keys.let_in("carol")
    first = enter("carol")
    first.hello()
    assert first.status()["state"] == "ready"
    (keys.clients / "carol.key").write_text(keys.make("carol-2").read_text())
    assert hears_nothing(first, 1.2)
    first.status_sent()
    assert hears_nothing(first, 0.5)
    second = enter("carol-2")
    second.hello()
    second.generate("r", ids=ids(1, 2), params={"max_tokens": 5})
    assert second.wait(Accepted).resolved["tenant"] == "carol"
    stale = enter("carol")
    stale.send(Hello("c", "stale"))
    assert hears_nothing(stale, 0.5)


def test_a_key_that_is_revoked_ends_what_it_began_and_hears_nothing_more(enter: Callable[..., Any], keys: Keys) -> None:
    keys.let_in("dave")
    dave, alice = enter("dave"), enter("alice")
    dave.hello()
    alice.hello()
    dave.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000, "n": 40})
    dave.wait(Chunks)
    keys.revoke("dave")
    alice.until(lambda report: report["requests"]["open"] == 0, seconds=3.0)
    while dave.socket.poll(300):  # what was on its way
        dave.socket.recv()
    for message in (Renew(1), List(1), Hello(dave.name, "again"), Cancel(("r",))):
        dave.send(message)
    dave.generate("again", ids=ids(1))
    assert hears_nothing(dave)
    alice.until(lambda report: not report["scheduler"].get("running", 1))
    assert alice.status()["requests"]["open"] == 0


def test_users_who_know_each_others_ids_get_nothing_of_each_other(enter: Callable[..., Any]) -> None:
    alice, bob = enter("alice"), enter("bob")
    alice.hello()
    alice.generate("r", ids=ids(1, 2), params={"max_tokens": 5000, "seed": 1})
    accepted = alice.wait(Accepted)
    bob.name = alice.name
    bob.hello()
    bob.send(List(1))
    assert bob.wait(Listing).requests == ()
    bob.send(Cancel(("r",)))
    # Knowing the value, bob may have it made once more, under his own name; alice's stream is another one.
    bob.generate("r", resume={**accepted.resolved, "received": (b"",)})
    error = bob.failure("r")
    assert (error["code"], error["field"], error["limit"]) == ("invalid_request", "tenant", "bob")
    bob.generate("r", ids=ids(3), params={"max_tokens": 2})
    assert bob.done("r")["generated_tokens"] == 2
    bob.send(Goodbye())
    assert alice.done("r")["generated_tokens"] == 5000
    assert not [message for message in alice.got if isinstance(message, Goodbye)]


def test_a_user_takes_over_its_own_client(enter: Callable[..., Any]) -> None:
    first = enter("alice")
    first.hello()
    first.generate("r", ids=ids(1, 2), params={"max_tokens": 5000})
    resolved = first.wait(Accepted).resolved
    second = enter("alice")
    second.name = first.name
    second.hello()
    second.generate("r", resume={**resolved, "received": (b"",)})
    assert second.done("r")["generated_tokens"] == 5000


def test_a_tenant_is_the_user_and_nobody_else(enter: Callable[..., Any]) -> None:
    alice = enter("alice")
    alice.hello()
    alice.generate("mine", ids=ids(1), params={"max_tokens": 1}, tenant="alice")
    assert alice.done("mine")["generated_tokens"] == 1
    alice.generate("other", ids=ids(1), tenant="bob")
    assert alice.failure("other")["field"] == "tenant"


def test_a_routing_id_that_can_be_guessed_is_refused(enter: Callable[..., Any]) -> None:
    for routing_id in (b"", b"short"):
        alice = enter("alice", routing_id=routing_id)
        alice.send(Hello("c", "n"))
        assert "routing id" in alice.failure(None)["message"]


def test_the_place_of_a_broken_connection_cannot_be_taken_by_another_user(enter: Callable[..., Any]) -> None:
    place = os.urandom(16)
    alice = enter("alice", routing_id=place)
    alice.hello()
    alice.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000})
    alice.wait(Accepted)
    alice.socket.close(linger=0)
    time.sleep(0.2)
    bob = enter("bob", routing_id=place)  # as if he had guessed it
    bob.name = alice.name
    for message in (Hello(bob.name, ""), List(1), Cancel(("r",)), Goodbye()):
        bob.send(message)
    while bob.socket.poll(500):
        assert b"\x01\x01" not in bob.socket.recv()[1:3]  # no Welcome
    again = enter("alice")
    again.name = alice.name
    again.hello()
    again.send(List(1))
    assert [row["request"] for row in again.wait(Listing).requests] == ["r"]
    again.send(Goodbye())


def test_the_streams_of_a_user_are_counted_over_all_its_clients(enter: Callable[..., Any]) -> None:
    first, second, bob = enter("alice"), enter("alice"), enter("bob")
    for raw in (first, second, bob):
        raw.hello()
    first.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000, "n": 30})
    first.wait(Accepted)
    second.generate("r", ids=ids(1, 2), params={"max_tokens": 30_000, "n": 11})
    error = second.failure("r")
    assert (error["code"], error["limit"]) == ("overloaded", "40 streams")
    bob.generate("r", ids=ids(1, 2), params={"max_tokens": 2, "n": 30})
    assert bob.done("r")["generated_tokens"] == 60
    first.send(Goodbye())


def test_keys_are_demanded_also_where_all_actors_share_one_process(keys: Keys, connect: Callable[..., Any]) -> None:
    keys.let_in("erin")
    pair = read_pair(keys.root / "erin.key_secret")

    def prepare(socket: Any) -> None:
        socket.setsockopt(zmq.ROUTING_ID, os.urandom(16))
        socket.curve_serverkey, socket.curve_publickey = keys.server.public.encode(), pair.public.encode()
        socket.curve_secretkey = pair.secret.encode()

    with Engine("tiny", executor="mock", placement="threads", **keys.config) as engine:
        engine.wait(60)
        erin, stranger = connect(engine.address, prepare=prepare), connect(engine.address)
        stranger.send(Hello("c", "n"))
        erin.hello()
        erin.generate("r", prompt="hello there", params={"max_tokens": 5})
        assert erin.done("r")["generated_tokens"] == 5
        assert hears_nothing(stranger, 0.3)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"address": "tcp://0.0.0.0:5555"}, "address"),
        ({"address": "tcp://*:5555"}, "address"),
        ({"address": "tcp://10.0.0.1:5555"}, "address"),
        ({"address": "tcp://127.0.0.1.example.com:5555"}, "address"),
        ({"address": "tcp://0.0.0.0:5555", "secret_key": "k"}, "client_keys"),
        ({"address": "tcp://0.0.0.0:5555", "client_keys": "c"}, "secret_key"),
        ({"address": "inproc://door", "secret_key": "k", "client_keys": "c"}, "address"),
        ({"address": "tcp://0.0.0.0:99999", "secret_key": "k", "client_keys": "c"}, "address"),
        ({"address": "udp://0.0.0.0:5555", "secret_key": "k", "client_keys": "c"}, "address"),
    ],
)
def test_an_address_that_others_can_reach_needs_both_keys(config: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as caught:
        EngineConfig(**config)
    assert caught.value.fault.field == field


def test_with_keys_any_address_will_do() -> None:
    for address in ("tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:5555", "tcp://127.0.0.1:5555", "ipc:///tmp/door", None):
        EngineConfig(address=address, secret_key="k", client_keys="c")


def test_an_engine_does_not_start_with_keys_that_others_can_read_or_change(keys: Keys, tmp_path: Path) -> None:
    readable = tmp_path / "server.key_secret"
    shutil.copy(keys.root / "server.key_secret", readable)
    readable.chmod(0o644)
    writable = tmp_path / "clients"
    writable.mkdir()
    writable.chmod(0o777)
    missing = tmp_path / "nowhere"
    for name, path in (("secret_key", readable), ("secret_key", missing), ("client_keys", writable), ("client_keys", missing)):
        with pytest.raises(Refusal, match=str(path)):
            Door(zmq.Context.instance(), EngineConfig(**{**keys.config, name: str(path)}))
    broken = {**keys.config, "secret_key": str(readable)}
    with pytest.raises(PenstockError, match=str(readable)), Engine("tiny", executor="mock", **broken) as engine:
        engine.wait(60)


def test_a_pair_is_private_and_is_never_written_over(tmp_path: Path) -> None:
    public, secret = new_pair(tmp_path / "new", "alice")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert read_pair(secret).public == read_public(public) == read_public(secret)
    before = secret.read_text()
    with pytest.raises(Refusal):
        new_pair(tmp_path / "new", "alice")
    assert secret.read_text() == before
    assert load_certificate(str(secret))[0] == read_pair(secret).public.encode()
    for name in ("", "../alice", "a/b", ".hidden", "a" * 65, "a b"):
        with pytest.raises(Refusal):
            new_pair(tmp_path / "new", name)


def test_a_pair_whose_public_file_cannot_be_made_leaves_no_secret_file(tmp_path: Path) -> None:
    (tmp_path / "alice.key").write_text("somebody's")
    with pytest.raises(Refusal, match="cannot make keys: File exists"):
        new_pair(tmp_path, "alice")
    assert [path.name for path in tmp_path.iterdir()] == ["alice.key"]


def test_text_that_spells_no_32_bytes_is_no_key(tmp_path: Path) -> None:
    secret = tmp_path / "x.key_secret"
    secret.write_text(f'curve\n    public-key = "{"#" * 40}"\n    secret-key = "{"#" * 40}"\n')
    secret.chmod(0o600)
    for read in (read_pair, read_public):
        with pytest.raises(Refusal, match="is no file of keys"):
            read(secret)
    assert not is_key("#" * 40)
    assert is_key(zmq.curve_keypair()[0].decode())


# ── the folder of those who may come in ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With alice, whose file was there long before anybody looked."""
    path = tmp_path / "clients"
    new_pair(path, "alice")
    time.sleep(2 * UNSETTLED_S)
    return path


def in_(found: KeyFolder) -> list[str]:
    return sorted(found.users.values())


def test_a_file_that_cannot_be_read_lets_nobody_in_and_keeps_nobody_out(folder: Path) -> None:
    (folder / "broken.key").write_text("no key")
    (folder / "directory.key").mkdir()
    (folder / "nowhere.key").symlink_to("/nowhere")
    (folder / "circle.key").symlink_to(folder / "circle.key")
    found = KeyFolder(folder)
    assert found.users == {read_public(folder / "alice.key"): "alice"}
    assert len(found.unreadable) == 4
    assert found.error is None
    assert not found.look()
    shutil.rmtree(folder)
    assert found.look()
    assert found.users == {}
    assert found.error == f"{folder} is not there"


def test_a_pipe_or_a_device_in_place_of_a_key_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.key")
    (folder / "tty.key").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket.key"))
        found = KeyFolder(folder)
    assert in_(found) == ["alice"]
    assert len(found.unreadable) == 3
    with pytest.raises(Refusal, match="is no regular file"):
        read_public(folder / "pipe.key")


def test_files_that_go_while_the_folder_is_read_keep_nobody_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_pair(folder, "bob")
    found, opened = KeyFolder(folder), os.open

    def gone(path: Any, *more: Any, **named: Any) -> int:
        (folder / "bob.key").unlink(missing_ok=True)
        return opened(path, *more, **named)

    monkeypatch.setattr(os, "open", gone)
    os.utime(folder / "alice.key")
    assert found.look()
    assert in_(found) == ["alice"]


@pytest.mark.parametrize("failing", ["the folder", "a file"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM])
def test_an_error_that_is_not_the_folders_own_changes_nothing(
    folder: Path, failing: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    found = KeyFolder(folder)
    users, descriptors = found.users, len(os.listdir("/proc/self/fd"))
    new_pair(folder, "bob")
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir" if failing == "the folder" else "open", fail)
        for _ in range(3):
            assert not found.look()
            assert found.users is users
            assert found.error == f"{folder} cannot be read: {os.strerror(code)}"
        with pytest.raises(Refusal, match=os.strerror(code)):
            KeyFolder(folder)
    assert found.look()
    assert in_(found) == ["alice", "bob"]
    assert found.error is None
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_without_descriptors_everybody_stays_in(folder: Path) -> None:
    found = KeyFolder(folder)
    (folder / "directory.key").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert not found.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert in_(found) == ["alice"]
    assert found.error == f"{folder} cannot be read: Too many open files"


def test_a_key_that_is_written_over_is_seen_whatever_its_times_say(folder: Path, tmp_path: Path) -> None:
    alice = folder / "alice.key"
    os.utime(alice, (1e9, 1e9))
    time.sleep(2 * UNSETTLED_S)
    found = KeyFolder(folder)
    assert not found.look()
    with alice.open("r+") as file:  # the same file, of the same size
        file.write(new_pair(tmp_path, "other")[0].read_text())
    os.utime(alice, (1e9, 1e9))
    assert found.look()
    assert found.users == {read_public(tmp_path / "other.key"): "alice"}


def test_a_key_that_is_written_over_within_a_tick_of_the_clock_is_seen(folder: Path, tmp_path: Path) -> None:
    texts = [new_pair(tmp_path, name)[0] for name in ("one", "two")]
    found = KeyFolder(folder)
    for number in range(200):
        with (folder / "alice.key").open("r+") as file:
            file.write(texts[number % 2].read_text())
        found.look()
        assert list(found.users) == [read_public(texts[number % 2])]


def test_two_files_with_one_key_let_neither_in(folder: Path) -> None:
    new_pair(folder, "bob")
    found = KeyFolder(folder)
    shutil.copy(folder / "alice.key", folder / "aaron.key")
    assert found.look()
    assert in_(found) == ["bob"]
    assert found.unreadable == [f"{folder}: aaron.key, alice.key hold one key: none of them may come in"]
    (folder / "aaron.key").unlink()
    assert found.look()
    assert in_(found) == ["alice", "bob"]
    assert found.unreadable == []


def test_a_glance_reads_the_folder_only_if_something_in_it_came_went_or_was_just_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, scans, scandir = KeyFolder(folder), [0], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (scans.append(0), scandir(path))[1])
    for _ in range(1000):
        found.glance()
    assert len(scans) == 1
    new_pair(folder, "bob")
    found.glance()
    assert in_(found) == ["alice", "bob"]
    with (folder / "carol.key").open("w") as file:  # as a copy is made: the file is there before what is in it
        found.glance()
        assert in_(found) == ["alice", "bob"]
        file.write(new_pair(tmp_path, "carol")[0].read_text())
    found.glance()
    assert in_(found) == ["alice", "bob", "carol"]
    (folder / "bob.key").unlink()
    found.glance()
    assert in_(found) == ["alice", "carol"]


class Told:
    """A log that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **values: self.lines.append((level, values))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        lines, self.lines = self.lines, []
        return lines


def test_what_is_wrong_with_keys_is_told_once(keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: Any = Told()
    address = f"ipc:///tmp/pk{os.getpid()}"
    (folder / "broken.key").write_text("no key")
    config = EngineConfig(address=address, secret_key=keys.config["secret_key"], client_keys=str(folder))
    with zmq.Context() as context:
        reception = Reception(context, config, log, lambda _: None)  # type: ignore[arg-type,return-value]
        try:
            now = 100.0

            def look() -> list[tuple[str, dict[str, Any]]]:
                nonlocal now
                for _ in range(5):
                    now += 2 * LOOK_EVERY_S
                    reception.revoked(now)
                return log.take()

            [(level, values)] = look()
            assert (level, values["files"]) == ("warning", 1)
            assert "broken.key" in values["why"][0]
            shutil.copy(folder / "alice.key", folder / "broken.key")
            (told, warned) = look()
            assert told == ("info", {"users": 0})
            assert warned[0] == "warning"
            assert "alice.key, broken.key" in warned[1]["why"][0]
            with monkeypatch.context() as patched:
                patched.setattr(os, "scandir", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
                [(level, values)] = look()
                assert (level, values["error"]) == ("error", f"{folder} cannot be read: Input/output error")
            assert look() == []
        finally:
            reception.close()


def test_an_odd_file_in_the_folder_of_keys_ends_nobodys_stream(enter: Callable[..., Any], keys: Keys) -> None:
    alice = enter("alice")
    alice.hello()
    alice.generate("r", ids=ids(1, 2), params={"max_tokens": 5000})
    alice.wait(Accepted)
    (keys.clients / "old.key").symlink_to("/nowhere")
    try:
        assert alice.done("r")["generated_tokens"] == 5000
        time.sleep(3 * LOOK_EVERY_S)
        assert alice.status()["state"] == "ready"
    finally:
        (keys.clients / "old.key").unlink()
