"""Conversations derived from documentation entries and from short functions of the standard library."""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from examples.tiny.primer import SMALL_TALK
from examples.tiny.rst import Entry, Section
from examples.tiny.styles import fenced, numbered, sentences, shout

Part = tuple[str, bool]  # a piece of text, and whether a model is to learn to write it

LONGEST_ANSWER = 480  # characters, so that an answer ends well within the reader's patience
LONGEST_FUNCTION = 24  # lines
STYLED = 0.15  # the share of conversations in which a system prompt asks for a style
PLAIN_SYSTEMS = ("You are a helpful assistant.", "You are a Python expert.", "You answer questions about Python.")
STYLE_SYSTEMS = {
    "shout": "Answer in capital letters.",
    "list": "Answer with a numbered list.",
    "python": "Answer with code only.",
    "brief": "Answer in one sentence.",
}
EXPLAIN = (
    "What does {} do?",
    "Explain {}",
    "Explain {}.",
    "What is {}?",
    "Tell me about {}.",
    "Describe {}.",
    "What is {} for?",
    "Can you explain {}?",
)
CALL = ("How do I use {}?", "How do I call {}?", "How is {} used?")
EXAMPLE = ("Show me an example of {}.", "Give me an example of {}.", "Write an example that uses {}.")
WRITE = (
    "Write a function to {}.",
    "Write a Python function to {}.",
    "Write a function to {}",
    "How do I {} in Python?",
)
TOPIC = ("Explain {}", "Tell me about {}.", "What should I know about {}?")
NO_LEAD = (" ", "New in version", "Changed in version", "Availability", "Deprecated")
NAMED = re.compile(r"^[A-Za-z_][\w.]+$")
SIGNATURE = re.compile(r"^@?[A-Za-z_][\w.]+(\(.*)?$")


@dataclass(frozen=True)
class Exchange:
    """A question, its answer in words, and its answer as code; one of the two answers may be empty."""

    question: str
    words: str
    code: str = ""

    def answer(self) -> str:
        return self.words or fenced(self.code)


def lead(blocks: Iterable[str]) -> str:
    """The first paragraphs of an explanation, whole sentences only, without code."""
    text = ""
    for block in blocks:
        if block.startswith(NO_LEAD) or "\n" in block:
            break
        text = f"{text}\n\n{block}" if text else block
        if len(text) > LONGEST_ANSWER // 2:
            break
    if len(text) > LONGEST_ANSWER:
        kept = ""
        for sentence in sentences(text):
            if kept and len(kept) + len(sentence) > LONGEST_ANSWER:
                break
            kept = f"{kept} {sentence}".strip()
        text = kept
    if text.endswith(":"):
        text = text.removesuffix(":") + "."
    return text.strip()


def first_code(blocks: Iterable[str]) -> str:
    for block in blocks:
        source = textwrap.dedent(block)
        if block.startswith(" ") and source.count("\n") < LONGEST_FUNCTION and re.search(r"[=(:]", source):
            return source.strip()
    return ""


def from_entry(entry: Entry, rng: random.Random) -> Iterator[Exchange]:
    if not NAMED.match(entry.name) or not SIGNATURE.match(entry.signature):
        return
    name = entry.name + "()" if "(" in entry.signature and rng.random() < 0.3 else entry.name
    words, code = lead(entry.blocks), first_code(entry.blocks)
    if len(words) > 20:
        for question in rng.sample(EXPLAIN, 2):
            yield Exchange(question.format(name), words, code)
        if "(" in entry.signature and rng.random() < 0.4:
            call = entry.name + entry.signature[entry.signature.index("(") :]
            yield Exchange(rng.choice(CALL).format(name), f"Use `{call}`. {words}", code)
    if code:
        yield Exchange(rng.choice(EXAMPLE).format(name), "", code)


def from_section(section: Section, rng: random.Random) -> Iterator[Exchange]:
    words = lead(block for block in section.blocks if not block.startswith("**Source code"))
    if section.title == "Glossary":
        for block in section.blocks:
            found = re.match(r"^([a-z][\w -]{2,40}): ([A-Z].*)$", block)
            if found:
                term, meaning = found.group(1), lead([found.group(2)])
                article = "an" if term[0] in "aeiou" else "a"
                for question in (f"What is {article} {term}?", f"Explain {term}.", f"Define {term}."):
                    yield Exchange(question, meaning)
    elif len(words) < 60 or not 3 < len(section.title) < 60:
        return
    elif section.title.endswith("?"):
        yield Exchange(section.title, words)
    elif " - " in section.title:
        module = section.title.partition(" - ")[0]
        for question in (f"What is the {module} module for?", f"What is {module}?", f"Explain the {module} module."):
            yield Exchange(question, words)
    else:
        yield Exchange(rng.choice(TOPIC).format(section.title), words, first_code(section.blocks))


def from_source(source: str, rng: random.Random) -> Iterator[Exchange]:
    """Yields requests for the short, documented functions of a module's source."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or not node.end_lineno:
            continue
        summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
        summary = " ".join(summary.split()).rstrip(".")
        if not 12 < len(summary) < 160 or node.end_lineno - node.lineno >= LONGEST_FUNCTION:
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        first = summary.split()[0]
        if isinstance(node, ast.ClassDef):
            yield Exchange(f"Write a class named {node.name}.", "", code)
        elif first.istitle() and first.isalpha() and not first.endswith(("s", "ed", "ing")) and len(first) > 2:
            yield Exchange(rng.choice(WRITE).format(summary[0].lower() + summary[1:]), "", code)
        else:
            yield Exchange(f"Write a function named {node.name}.", "", code)
        yield Exchange(rng.choice(EXPLAIN).format(node.name), f"{summary}.", code)


def from_primer() -> Iterator[Exchange]:
    for questions, answer in SMALL_TALK:
        for question in questions:
            yield Exchange(question, answer)


def styled(exchange: Exchange, style: str) -> str:
    """The exchange's answer in a style, or nothing where the style has no answer to it."""
    if style == "python":
        # A session at the prompt is no source code.
        return fenced(exchange.code) if exchange.code and not exchange.code.startswith(">>>") else ""
    if style == "shout":
        return shout(exchange.answer())
    if not exchange.words:
        return ""
    return numbered(exchange.words) if style == "list" else sentences(exchange.words)[0]


def turn(exchange: Exchange, answer: str) -> list[Part]:
    return [(f"<|user|>{exchange.question}<|end|><|assistant|>", False), (f"{answer}<|end|>", True)]


def conversations(exchanges: list[Exchange], rng: random.Random) -> Iterator[list[Part]]:
    """Yields conversations of one to three turns, some under a system prompt, some in a style that it asks for."""
    at = 0
    while at < len(exchanges):
        turns = rng.choices((1, 2, 3), weights=(7, 2, 1))[0]
        group = exchanges[at : at + turns]
        at += turns
        style = rng.choice(list(STYLE_SYSTEMS)) if rng.random() < STYLED else ""
        answers = [styled(exchange, style) if style else exchange.answer() for exchange in group]
        parts: list[Part] = []
        if style:
            parts.append((f"<|system|>{STYLE_SYSTEMS[style]}<|end|>", True))
        elif rng.random() < 0.2:
            parts.append((f"<|system|>{rng.choice(PLAIN_SYSTEMS)}<|end|>", True))
        for exchange, answer in zip(group, answers, strict=True):
            if answer:
                parts += turn(exchange, answer)
        if any(learnt for _, learnt in parts[1:]):
            yield parts
