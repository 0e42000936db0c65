"""Part of the demo: one prompt, answered by the base model and by each of its adapters, in one batch."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from penstock.clients.aio import AsyncClient

QUESTION = "What is a dictionary?"
TOKENS = 48
MOST = 3  # adapters beside the base model


async def answers(client: AsyncClient, names: list[str]) -> dict[str, str]:
    """What each says, by adapter; all are asked at once. They are ready before, so that they share their steps."""
    await asyncio.gather(*(client.generate([1], adapter=name, max_tokens=1) for name in names))
    wishes: list[dict[str, Any]] = [{}, *({"adapter": name} for name in names)]
    question = [{"role": "user", "content": QUESTION}]
    said = await asyncio.gather(*(client.chat(question, max_tokens=TOKENS, temperature=0.0, **wish) for wish in wishes))
    return {wish.get("adapter", "no adapter"): one.text for wish, one in zip(wishes, said, strict=True)}


def show(console: Console, said: dict[str, str]) -> None:
    if not console.is_terminal:
        for name, text in said.items():
            console.print(f"[{name}] {text}".replace("\n", "\n     "), markup=False)
        return
    width = max(24, console.width // len(said) - 1)
    panels = [Panel(Text(text), title=name, width=width, border_style="magenta") for name, text in said.items()]
    console.print(Columns(panels, padding=0))
