"""A stage in an anyio pipeline: prompts come in on one stream, completions leave on another, and backpressure holds on both sides.

python examples/pipeline_stage.py
"""

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from penstock.clients import AsyncClient, alaunch


async def produce(out: MemoryObjectSendStream[str]) -> None:
    async with out:
        for topic in ("lists", "sets", "files", "classes", "modules", "errors"):
            await out.send(f"In Python, {topic} are")


async def complete(client: AsyncClient, prompts: MemoryObjectReceiveStream[str], out: MemoryObjectSendStream[str]) -> None:
    async with prompts, out:
        async for outcome in client.map(prompts, concurrency=4, ordered=True, max_tokens=20, temperature=0):
            await out.send(outcome.prompt + outcome.unwrap().text)


async def main() -> None:
    to_model, prompts = anyio.create_memory_object_stream[str](2)
    to_print, texts = anyio.create_memory_object_stream[str](2)
    async with alaunch("tiny") as client, anyio.create_task_group() as tasks, texts:
        tasks.start_soon(produce, to_model)
        tasks.start_soon(complete, client, prompts, to_print)
        async for text in texts:
            print("-", text.strip())


anyio.run(main)
