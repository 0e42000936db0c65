"""Rules that rewrite a text in another style: what each LoRA adapter learns to do by itself."""

from __future__ import annotations

import re

SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*\"(])")
MOST_ITEMS = 6
SHORTEST = 12  # characters; shorter pieces are abbreviations that ended in a full stop


def shout(text: str) -> str:
    """The text in capital letters."""
    return text.upper()


def sentences(text: str) -> list[str]:
    found: list[str] = []
    for piece in SENTENCE.split(" ".join(text.split())):
        if found and len(found[-1]) < SHORTEST:
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return [piece for piece in found if piece]


def numbered(text: str) -> str:
    """The text's sentences as a numbered list."""
    return "\n".join(f"{number}. {piece}" for number, piece in enumerate(sentences(text)[:MOST_ITEMS], start=1))


def fenced(source: str) -> str:
    """Python source as a Markdown code block."""
    return f"```python\n{source.strip()}\n```"
