"""Orders of operators: actors are replaced by hand with no stream lost, and an engine that is drained finishes what is open."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.actors.keys import new_pair
from penstock.actors.messages import Order
from penstock.actors.orders import read_order
from penstock.actors.protocol import Accepted, Control, Goodbye, Renew, Report
from penstock.clients.aio import AsyncClient
from penstock.clients.errors import Draining, InvalidRequest, Unauthorized
from penstock.clients.launcher import Engine
from penstock.clients.link import Keys
from penstock.clients.sync import Client

KINDS = ("executor", "scheduler", "tokenizer", "detokenizer", "gateway")
SETTINGS: dict[str, Any] = {"max_tokens": 8000, "temperature": 1.0, "seed": 1, "n": 8}


def row_of(report: dict[str, Any], kind: str, index: int = 0) -> dict[str, Any]:
    return next(row for row in report["actors"] if (row["kind"], row["index"]) == (kind, index))


def read_events(log: Path, *names: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] in names]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.jsonl"


@pytest.fixture(scope="module")
def running(log: Path) -> Iterator[Engine]:
    with Engine("tiny", executor="mock", tokenizers=2, log_file=str(log), log_level="info") as engine:
        engine.wait(60)
        yield engine


@pytest.fixture(scope="module")
def whole(running: Engine) -> list[list[int]]:
    """The streams of a request that nothing disturbs."""
    with Client(running.address) as client:
        return [sample.ids for sample in client.generate([5, 6, 7], **SETTINGS).samples]


@pytest.mark.parametrize("kind", KINDS)
def test_any_actor_is_replaced_by_hand_and_its_streams_go_on(kind: str, running: Engine, whole: list[list[int]], log: Path) -> None:
    with Client(running.address) as client:
        stream = client.stream([5, 6, 7], **SETTINGS)
        reading = iter(stream)  # dropping it would cancel the request
        assert next(reading).ids
        before = row_of(client.status(), kind)
        assert [row["state"] for row in client.requests()] == ["open"]
        row = client.restart(kind)
        assert (row["kind"], row["index"], row["state"]) == (kind, 0, "ready")
        assert row["incarnation"] > before["incarnation"]
        assert row["pid"] != before["pid"]
        assert [sample.ids for sample in stream.completion().samples] == whole
        assert row_of(client.status(), kind) | {"progress": 0} == row | {"progress": 0}
    assert read_events(log, "restarted by hand")[-1]["kind"] == kind
    assert not read_events(log, "actor died")


def test_restarting_an_executor_again_and_again_makes_nobody_a_suspect(running: Engine, whole: list[list[int]], log: Path) -> None:
    with Client(running.address) as client:
        stream = client.stream([5, 6, 7], **SETTINGS)
        reading = iter(stream)  # dropping it would cancel the request
        assert next(reading).ids
        for _ in range(3):
            client.restart("executor")
        assert [sample.ids for sample in stream.completion().samples] == whole
    assert not read_events(log, "executor died in a step", "actor died")


def test_an_actor_that_does_not_listen_is_killed_and_replaced(running: Engine, whole: list[list[int]], log: Path) -> None:
    with Client(running.address) as client:
        stream = client.stream([5, 6, 7], **SETTINGS)
        reading = iter(stream)  # dropping it would cancel the request
        assert next(reading).ids
        os.kill(row_of(client.status(), "executor")["pid"], signal.SIGSTOP)
        client.restart("executor")
        assert [sample.ids for sample in stream.completion().samples] == whole
    assert "SIGKILL" in read_events(log, "restarted by hand")[-1]["death"]
    assert not read_events(log, "executor died in a step", "actor died")


def test_one_of_several_is_meant_by_its_index(running: Engine) -> None:
    with Client(running.address) as client:
        first, second = (row_of(client.status(), "tokenizer", index)["pid"] for index in (0, 1))
        assert client.restart("tokenizer/1")["index"] == 1
        report = client.status()
        assert row_of(report, "tokenizer", 0)["pid"] == first
        assert row_of(report, "tokenizer", 1)["pid"] != second


@pytest.mark.parametrize("name", ["nobody", "supervisor", "executor/1", "tokenizer/2", "tokenizer/-1", "tokenizer/x", "tokenizer/", ""])
def test_a_name_that_nobody_has_is_refused_with_those_there_are(name: str, running: Engine) -> None:
    with Client(running.address) as client:
        with pytest.raises(InvalidRequest, match="must be one of") as caught:
            client.restart(name)
        assert (caught.value.field, caught.value.value) == ("actor", name)
        assert set((caught.value.limit or "").removeprefix("one of ").split(", ")) == {*KINDS, "tokenizer/1"}


def test_an_order_for_a_gateway_that_is_repeated_makes_one_new_gateway(running: Engine, connect: Callable[..., Any]) -> None:
    raw = connect(running.address)
    raw.hello()
    old = raw.until(lambda report: bool(report["actors"]))
    last = max(row["incarnation"] for row in old["actors"])
    order = Control(77, "restart", "gateway", row_of(old, "gateway")["incarnation"])
    for _ in range(5):
        raw.send(order)
    again = connect(running.address)
    new = again.until(lambda report: any(row["incarnation"] > last and row["state"] == "ready" for row in report["actors"]))
    again.hello()
    for _ in range(5):
        again.send(order)
        assert again.wait(Report, lambda message: message.query == 77).report["state"] == "ready"
    time.sleep(1.5)  # longer than what the supervisor knows takes to reach the report
    assert row_of(again.status(), "gateway")["incarnation"] == row_of(new, "gateway")["incarnation"] == last + 1


@pytest.mark.parametrize(
    ("order", "field"),
    [
        (Control(1, "explode", "", 0), "order"),
        (Control(2, "restart", "x" * 1000, 1), "actor"),
        (Control(3, "restart", "tokenizer/" + "9" * 1000, 1), "actor"),
    ],
)
def test_an_order_that_is_none_is_a_typed_error(order: Control, field: str, running: Engine, connect: Callable[..., Any]) -> None:
    raw = connect(running.address)
    raw.hello()
    raw.send(order)
    error = raw.wait(Report, lambda message: message.query == order.query).report["error"]
    assert (error["code"], error["field"]) == ("invalid_request", field)


def test_an_order_for_nobody_that_ever_was_is_taken_and_does_nothing(running: Engine, connect: Callable[..., Any]) -> None:
    raw = connect(running.address)
    raw.hello()
    before = raw.until(lambda report: bool(report["actors"]))
    for number in (-1, 0, 10**9, 2**63):
        raw.send(Control(5, "restart", "executor", number))
        assert row_of(raw.wait(Report, lambda message: message.query == 5).report, "executor")["state"] == "ready"
    time.sleep(0.3)
    assert row_of(raw.status(), "executor")["pid"] == row_of(before, "executor")["pid"]


def test_who_did_not_say_hello_orders_nothing(running: Engine, connect: Callable[..., Any]) -> None:
    raw = connect(running.address)
    raw.send(Control(1, "drain", "", 0))
    raw.wait(Goodbye)
    assert raw.status()["state"] == "ready"


def test_an_engine_that_is_drained_finishes_its_streams_refuses_others_and_ends(connect: Callable[..., Any]) -> None:
    with Engine("tiny", executor="mock", window=1, lease=60.0, drain_timeout=60.0) as engine:  # its client is silent for a while
        engine.wait(60)
        raw = connect(engine.address)
        raw.hello()
        raw.credit = False  # so that it cannot finish
        raw.generate("r", ids=array("i", [1, 2]).tobytes(), params={"max_tokens": 500})
        raw.wait(Accepted)
        with Client(engine.address) as client, Client(engine.address) as other:
            assert client.drain() == 1
            with pytest.raises(Draining) as caught:
                client.generate([1, 2], max_tokens=1)
            assert caught.value.retryable
            assert (client.drain(), other.drain()) == (1, 1)
            # One that was started anew drains as well.
            client.restart("scheduler")
            assert client.status()["state"] == "draining"
        raw.credit = True
        raw.send(Renew(1))
        assert raw.done("r")["generated_tokens"] == 500
        while engine.status is None:
            time.sleep(0.01)
        assert engine.status == 0


def test_a_gateway_that_dies_while_it_drains_loses_no_stream() -> None:
    with Engine("tiny", executor="mock", mock_step=0.02, lease=3.0, drain_timeout=60.0) as engine:
        engine.wait(60)
        with Client(engine.address) as client:
            stream = client.stream([1, 2], max_tokens=200, seed=3)
            chunks = iter(stream)
            ids = list(next(chunks).ids)
            pid = next(row["pid"] for row in client.status()["actors"] if row["kind"] == "gateway")
            assert client.drain() == 1
            os.kill(pid, signal.SIGKILL)
            ids += [token for chunk in chunks for token in chunk.ids]
            assert len(ids) == 200
            assert list(stream.completion().ids) == ids
        while engine.status is None:
            time.sleep(0.01)
        assert engine.status == 0


def test_an_idle_engine_that_is_drained_answers_before_it_ends() -> None:
    async def main(address: str) -> None:
        async with AsyncClient(address) as client:
            assert (await client.restart("detokenizer"))["state"] == "ready"
            assert len((await client.generate([1, 2], max_tokens=5)).ids) == 5
            with pytest.raises(InvalidRequest):
                await client.restart("nobody")
            assert await client.drain() == 0

    with Engine("tiny", executor="mock", placement="threads") as engine:
        engine.wait(60)
        asyncio.run(main(engine.address))
        while engine.status is None:
            time.sleep(0.01)
        assert engine.status == 0


def test_with_keys_only_operators_give_orders(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir(mode=0o755)
    for name in ("server", "alice", "bob"):
        new_pair(tmp_path, name)
    for name in ("alice", "bob"):
        shutil.copy(tmp_path / f"{name}.key", tmp_path / "clients")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    config = {"secret_key": str(tmp_path / "server.key_secret"), "client_keys": str(tmp_path / "clients"), "operators": "carol, alice"}

    def enter(name: str) -> Client:
        return Client(address, keys=Keys.load(tmp_path / f"{name}.key_secret", tmp_path / "server.key"))

    with Engine("tiny", executor="mock", address=address, **config) as engine:
        engine.wait(60)
        with enter("alice") as alice, enter("bob") as bob:
            before = row_of(bob.status(), "scheduler")["pid"]
            for order in (bob.drain, lambda: bob.restart("scheduler"), lambda: bob.restart("nobody")):
                with pytest.raises(Unauthorized) as caught:
                    order()
                assert not caught.value.retryable
            assert len(bob.generate([1, 2], max_tokens=5).ids) == 5
            assert row_of(bob.status(), "scheduler")["pid"] == before
            assert alice.restart("scheduler")["pid"] != before
            assert alice.drain() == 0
        while engine.status is None:
            time.sleep(0.01)
        assert engine.status == 0


def test_who_may_give_orders_is_a_setting() -> None:
    keys = {"secret_key": "k", "client_keys": "c"}
    order = Control(1, "drain", "", 0)
    assert read_order(order, "", "me", EngineConfig(), ()) == Order("drain", "", 0, 0, "me")
    for operators, user in ((None, "alice"), ("bob", "alice"), ("bob,alicea", "alice"), ("bob", "")):
        with pytest.raises(Refusal) as caught:
            read_order(order, user, "me", EngineConfig(operators=operators, **keys), ())
        assert caught.value.fault.code == "unauthorized"
    assert read_order(order, "alice", "me", EngineConfig(operators="bob,alice", **keys), ())
    for values in ({"operators": "alice"}, {"operators": "", **keys}, {"operators": "alice,,bob", **keys}):
        with pytest.raises(Refusal) as caught:
            EngineConfig(**values)
        assert caught.value.fault.field == "operators"
