"""Many streams at once on one connection: the engine batches them, and each `async for` goes at its own pace.

python examples/many_streams.py
"""

import asyncio

from penstock.clients import AsyncClient, alaunch

PROMPTS = ["A list is", "A set is", "The function returns", "When an exception occurs,", "def add(a, b):\n", "Strings can be"]


async def read(client: AsyncClient, prompt: str) -> str:
    text = prompt
    async for chunk in client.stream(prompt, max_tokens=40, temperature=0.7):
        text += chunk.text
        if "\n\n" in text:
            break  # leaving the loop cancels the request, and its memory is free at once
    return text


async def main() -> None:
    async with alaunch("tiny") as client:
        for text in await asyncio.gather(*(read(client, prompt) for prompt in PROMPTS)):
            print("-", text.replace("\n", "\n  "))


asyncio.run(main())
