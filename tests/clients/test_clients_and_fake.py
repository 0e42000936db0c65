"""Both clients over real sockets, against a fake gateway that can be paused, restarted and made to refuse."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.clients import AsyncClient, AsyncStream, Client, Keys, Outcome, Stream
from penstock.clients.errors import ClientClosed, ConnectionLost, InvalidRequest, Overloaded, Unavailable

from .fake import FakeServer, expected, text_of


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer(f"ipc://{tmp_path}/door")
    yield fake
    fake.stop()


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


def test_async_streams_run_side_by_side_on_one_connection(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            assert client.model == {"name": "fake"}
            results = await asyncio.gather(*(read_all(client, f"p{index}", 30) for index in range(100)))
        for index, (ids, text) in enumerate(results):
            assert ids == expected(f"p{index}", 0, 30)
            assert text == text_of(ids)
        assert len(server.gateway.numbers) == 1

    asyncio.run(main())


def test_blocking_streams_run_side_by_side_in_threads(server: FakeServer) -> None:
    results: dict[int, list[int]] = {}

    def read(client: Client, index: int) -> None:
        results[index] = [id for chunk in client.stream(f"p{index}", max_tokens=30) for id in chunk.ids]

    with Client(server.address) as client:
        threads = [threading.Thread(target=read, args=(client, index)) for index in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {index: expected(f"p{index}", 0, 30) for index in range(20)}


def test_completions_have_all_samples_and_usage(server: FakeServer) -> None:
    async def main() -> Any:
        async with AsyncClient(server.address) as client:
            return await client.generate("a", n=3, max_tokens=7)

    with Client(server.address) as client:
        blocking = client.generate("a", n=3, max_tokens=7)
    for completion in (blocking, asyncio.run(main())):
        assert [sample.ids for sample in completion.samples] == [expected("a", sample, 7) for sample in range(3)]
        assert (completion.finish_reason, completion.usage.generated_tokens, completion.seed) == ("length", 21, 7)
        assert completion.prompt_ids == [1, 2]
        assert completion.first_token_s is not None
        assert 0 <= completion.first_token_s <= completion.total_s


async def read_all(client: AsyncClient, prompt: str, limit: int) -> tuple[list[int], str]:
    ids, text = [], ""
    async for chunk in client.stream(prompt, max_tokens=limit):
        ids += chunk.ids
        text += chunk.text
    return ids, text


async def fail_inside_of(stream: AsyncStream) -> None:
    async for _ in stream:
        raise ZeroDivisionError


def test_leaving_the_loop_cancels(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for _ in client.stream("a", max_tokens=100_000):
                break
            held = client.stream("b", max_tokens=100_000)
            async for _ in held:
                break
            async with client.stream("c", max_tokens=100_000):
                pass
            dropped = client.stream("d", max_tokens=100_000)
            del dropped
            with pytest.raises(ZeroDivisionError):
                await fail_inside_of(client.stream("e", max_tokens=100_000))
            gc.collect()
            await asyncio.to_thread(until, lambda: not server.gateway.served)

    asyncio.run(main())


def test_leaving_the_blocking_loop_cancels(server: FakeServer) -> None:
    with Client(server.address) as client:
        for _ in client.stream("a", max_tokens=100_000):
            break
        held = client.stream("b", max_tokens=100_000)
        for _ in held:
            break
        with client.stream("c", max_tokens=100_000):
            pass
        until(lambda: not server.gateway.served)


def test_cancelling_the_task_cancels_the_request(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            for call in (client.generate("a", max_tokens=100_000), read_all(client, "b", 100_000)):
                server.gateway.hold = True
                task = asyncio.ensure_future(call)
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                server.gateway.hold = False
            await asyncio.to_thread(until, lambda: not server.gateway.served)

    asyncio.run(main())


def test_cancel_by_id_ends_the_stream_with_its_reason(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("a", max_tokens=100_000, request="mine")
        next(iter_ := iter(stream))
        assert [row["request"] for row in client.requests()] == ["mine"]
        client.cancel("mine")
        assert [chunk.finish_reason for chunk in iter_][-1] == "cancelled"
        assert client.requests() == []


def test_a_slow_reader_gets_merged_chunks_and_slows_nobody(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            slow = client.stream("slow", max_tokens=200)
            assert (await client.generate("fast", max_tokens=200)).ids == expected("fast", 0, 200)
            await asyncio.to_thread(until, lambda: not server.gateway.served)
            await asyncio.sleep(0.05)
            chunks = [chunk async for chunk in slow]
            assert len(chunks) == 1
            assert chunks[0].ids == expected("slow", 0, 200)

    asyncio.run(main())


def test_a_restarted_engine_is_carried_on_with(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            streams = [client.stream(f"p{index}", max_tokens=300) for index in range(20)]
            readers = [aiter(stream) for stream in streams]
            firsts = [await anext(reader) for reader in readers]
            for engine in ("e2", "e3"):
                await asyncio.to_thread(server.restart, engine)
                await asyncio.sleep(0.1)
            for index, (first, reader) in enumerate(zip(firsts, readers, strict=True)):
                ids = first.ids + [id async for chunk in reader for id in chunk.ids]
                assert ids == expected(f"p{index}", 0, 300)

    asyncio.run(main())


def test_a_blocking_client_carries_on_too(server: FakeServer) -> None:
    with Client(server.address) as client:
        reader = iter(client.stream("a", max_tokens=300))
        ids = next(reader).ids
        server.restart("e2")
        assert ids + [id for chunk in reader for id in chunk.ids] == expected("a", 0, 300)


def test_a_saved_stream_is_resumed_by_another_client(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("a", max_tokens=100)
        head = next(reader := iter(stream)).ids
        saved = stream.save()
        stream.cancel()
        del reader
    with Client(server.address) as client:
        again = client.resume(saved)
        tail = [id for chunk in again for id in chunk.ids]
        assert again.completion().ids == expected("a", 0, 100)
    assert expected("a", 0, 100)[-len(tail) :] == tail
    assert len(tail) <= 100 - len(head)


@pytest.mark.parametrize("ordered", [True, False])
def test_map_gives_an_outcome_for_each_prompt(server: FakeServer, ordered: bool) -> None:
    busy = {"code": "overloaded", "message": "full", "retry_after": 0.01, "retryable": True}
    server.gateway.refuse = {"p3": [{"code": "invalid_request", "message": "no", "field": "prompt"}] * 3, "p5": [busy] * 3}
    prompts: list[Any] = [f"p{index}" for index in range(40)]
    prompts[7] = {"prompt": "p7", "max_tokens": 2}
    prompts[8] = ""

    async def source() -> Any:
        for prompt in prompts:
            yield prompt

    async def main() -> list[list[Outcome]]:
        async with AsyncClient(server.address) as client:
            return [
                [one async for one in client.map(given, concurrency=6, ordered=ordered, max_tokens=9)]
                for given in (iter(prompts), source())
            ]

    with Client(server.address) as client:
        runs = [list(client.map(iter(prompts), concurrency=6, ordered=ordered, max_tokens=9))]
    for outcomes in [*runs, *asyncio.run(main())]:
        assert sorted(one.index for one in outcomes) == list(range(40))
        assert not ordered or [one.index for one in outcomes] == list(range(40))
        for one in outcomes:
            if one.index in (3, 8):
                assert isinstance(one.error, InvalidRequest)
            else:
                assert one.unwrap().ids == expected(f"p{one.index}", 0, 2 if one.index == 7 else 9)


def test_map_holds_at_most_so_many_at_once_and_takes_prompts_as_it_goes(server: FakeServer) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for index in range(1000):
            taken += 1
            yield f"p{index}"

    most = 0
    with Client(server.address) as client:
        for outcome in client.map(source(), concurrency=4, max_tokens=3):
            most = max(most, len(server.gateway.served))
            assert taken <= outcome.index + 1 + 16
            if outcome.index == 50:
                break
        until(lambda: not server.gateway.served)
    assert most <= 4


def test_leaving_an_async_map_cancels_what_runs(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for outcome in client.map((f"p{index}" for index in range(10**9)), concurrency=8, ordered=False, max_tokens=5):
                if outcome.index == 20:
                    break
            await asyncio.to_thread(until, lambda: not server.gateway.served)

    asyncio.run(main())


def test_an_error_of_the_source_is_raised(server: FakeServer) -> None:
    def source() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for _ in client.map(source(), max_tokens=2):
                pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    with Client(server.address) as client, pytest.raises(ZeroDivisionError):
        list(client.map(source(), max_tokens=2))


def test_an_overloaded_engine_says_when_to_come_back(server: FakeServer) -> None:
    server.gateway.refuse = {"a": [{"code": "overloaded", "message": "full", "retry_after": 2.5, "retryable": True}]}
    with Client(server.address) as client, pytest.raises(Overloaded) as caught:
        client.generate("a")
    assert caught.value.retry_after == 2.5


def test_nobody_listening_is_a_lost_connection_and_a_starting_engine_is_unavailable(tmp_path: Path) -> None:
    async def connect(address: str) -> None:
        async with AsyncClient(address, connect_timeout=0.2):
            pass

    for call in (lambda address: Client(address, connect_timeout=0.2).open(), lambda address: asyncio.run(connect(address))):
        with pytest.raises(ConnectionLost):
            call(f"ipc://{tmp_path}/nobody")
    starting = FakeServer(f"ipc://{tmp_path}/starting", ready=False)
    try:
        for call in (lambda address: Client(address, connect_timeout=0.3).open(), lambda address: asyncio.run(connect(address))):
            with pytest.raises(Unavailable):
                call(starting.address)
    finally:
        starting.stop()


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "http://x:1"])
def test_an_address_that_cannot_be_is_an_invalid_request(address: str) -> None:
    with pytest.raises(InvalidRequest):
        Client(address).open()


def test_patience_ends_requests_when_the_engine_is_gone(server: FakeServer) -> None:
    with Client(server.address, patience=0.3) as client:
        server.gateway.hold = True
        stream = client.stream("a", max_tokens=10)
        time.sleep(0.05)
        server.stop()
        with pytest.raises(ConnectionLost):
            stream.completion()


def test_a_closed_client_says_so(server: FakeServer) -> None:
    client = Client(server.address)
    with pytest.raises(ClientClosed):
        client.stream("a")
    client.open()
    server.gateway.hold = True
    stream = client.stream("a")
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        stream.completion()


def test_a_client_belongs_to_its_event_loop(server: FakeServer) -> None:
    client = AsyncClient(server.address)

    async def use(first: bool) -> None:
        if first:
            await client.open()
        await client.generate("a", max_tokens=2)

    asyncio.run(use(True))
    with pytest.raises(ClientClosed):
        asyncio.run(use(False))


def _generate_in_child(client: Any, stream: Any, queue: Any) -> None:
    with pytest.raises(ClientClosed):
        iter(stream) if isinstance(stream, Stream) else aiter(stream)
    result = client.generate("child", max_tokens=20)
    queue.put((os.getpid(), (asyncio.run(result) if asyncio.iscoroutine(result) else result).ids))


def test_a_forked_child_makes_its_own_connection(server: FakeServer) -> None:
    context = multiprocessing.get_context("fork")

    def in_child(client: Any, stream: Any) -> list[int]:
        queue = context.Queue()
        child = context.Process(target=_generate_in_child, args=(client, stream, queue))
        child.start()
        pid, ids = queue.get(timeout=20)
        child.join(10)
        assert pid == child.pid
        assert child.exitcode == 0
        return list(ids)

    with Client(server.address) as client:
        stream = client.stream("parent", max_tokens=200)
        assert in_child(client, stream) == expected("child", 0, 20)
        assert stream.completion().ids == expected("parent", 0, 200)

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.stream("parent", max_tokens=200)
            assert in_child(client, stream) == expected("child", 0, 20)
            assert (await stream.completion()).ids == expected("parent", 0, 200)

    asyncio.run(main())


def test_ctrl_c_interrupts_a_blocking_wait_and_cancels(server: FakeServer) -> None:
    with Client(server.address) as client:
        server.gateway.hold = True
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.generate("a", max_tokens=5)
        server.gateway.hold = False
        until(lambda: not server.gateway.served)


def test_a_lease_outlives_a_program_that_computes(tmp_path: Path) -> None:
    fake = FakeServer(f"ipc://{tmp_path}/door", lease=0.3)
    try:
        with Client(fake.address) as client:
            client.generate("a", max_tokens=2)
            end = time.monotonic() + 0.7
            while time.monotonic() < end:
                sum(range(10_000))
            renewals = [message for message in fake.gateway.heard if type(message).__name__ == "Renew"]
            assert len(renewals) >= 4
    finally:
        fake.stop()


def test_a_client_with_keys_talks_to_an_engine_that_demands_them(tmp_path: Path) -> None:
    (public, secret), (own_public, own_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    fake = FakeServer(f"ipc://{tmp_path}/door", secret=secret)
    try:
        with Client(fake.address, keys=Keys(public.decode(), own_public.decode(), own_secret.decode())) as client:
            assert client.generate("a", max_tokens=5).ids == expected("a", 0, 5)
        with pytest.raises(ConnectionLost):
            Client(fake.address, connect_timeout=0.5).open()
    finally:
        fake.stop()
