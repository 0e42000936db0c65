"""Builds the corpus: Python's documentation and standard library as documents to train and to validate on.

    python -m examples.tiny.corpus --docs /usr/share/doc/python3.11/html/_sources --output corpus

The documentation's sources come with a source release of CPython (`Doc/`) or with a package such as Debian's
`python3.11-doc`; the standard library is that of the interpreter that runs this script.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from examples.tiny.chat import (
    Exchange,
    Part,
    conversations,
    from_entry,
    from_primer,
    from_section,
    from_source,
    styled,
    turn,
)
from examples.tiny.rst import Reader, Section
from examples.tiny.styles import fenced, numbered, shout

LONGEST = 4200  # characters of a document, so that its tokens fit well into the model's context
SHORTEST = 80
HELD_OUT = 25  # one source in so many is for validation only
TOLD_AGAIN = {"shout": 0.15, "list": 0.06}  # the share of sections that are told once more in a style
ASKED_OFTEN_TIMES = 4  # the questions that people try first deserve the answers that are learnt best
ASKED_OFTEN = frozenset(
    {"functions", "stdtypes", "functools", "os.path", "collections", "itertools", "json", "math", "random", "re"}
    | {"pathlib", "datetime", "time", "glossary", "heapq", "asyncio-task", "threading", "contextlib", "controlflow"}
    | {"datastructures", "exceptions", "string", "shutil", "statistics", "dataclasses", "enum", "logging", "copy"}
)
SNIPPETS = Path(__file__).with_name("snippets.txt")  # Python, yet text of the corpus and no part of this program
PRIMER_TIMES = 24  # the primer is short and asked for often
MOST_ADAPTED = 16_000  # an adapter sees each of its documents about once
MOST_PRIMED = 400  # of these, so that the primer is not forgotten
STYLES = ("shout", "python", "list")

# No prose and no ordinary code: tests, tables, generated files, and a copy of the documentation.
LEFT_OUT_FOLDERS = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"})
LEFT_OUT_FILES = re.compile(r"^(_sysconfigdata.*|entities|stringprep|__phello__|__hello__|this|antigravity)$")
LEFT_OUT_PAGES = frozenset({"contents", "changelog", "copyright", "license"})
MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")  # authors' addresses are no model's business


@dataclass
class Source:
    """One file of documentation or of code, read and taken apart."""

    name: str
    documents: list[str] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        # By name, so that a module and its documentation are held out together.
        return self.name not in ASKED_OFTEN and zlib.crc32(self.name.encode()) % HELD_OUT == 0


def read(path: Path) -> str:
    return MAIL.sub("someone@example.com", path.read_text(encoding="utf-8"))


def packed(blocks: Iterable[str], joint: str) -> Iterator[str]:
    """Joins blocks into documents of at most LONGEST characters, unless one block alone is longer."""
    text = ""
    for block in blocks:
        if text and len(text) + len(block) > LONGEST:
            yield text
            text = ""
        text = f"{text}{joint}{block}" if text else block
    if text:
        yield text


def read_page(path: Path, rng: random.Random) -> Source:
    source = Source(path.name.removesuffix(".txt").removesuffix(".rst"))
    times = ASKED_OFTEN_TIMES if source.name in ASKED_OFTEN else 1
    source.sections = Reader().read(read(path))
    for section in source.sections:
        source.documents += packed([section.title, *section.blocks], "\n\n")
        for _ in range(times):
            source.exchanges += from_section(section, rng)
            for entry in section.entries:
                source.exchanges += from_entry(entry, rng)
        for entry in section.entries:
            if rng.random() < 0.5:  # an entry alone, so that a text may also begin with a signature
                source.documents.append("\n\n".join([entry.signature, *entry.blocks])[:LONGEST])
    return source


def read_module(path: Path, rng: random.Random) -> Source | None:
    try:
        text = read(path).expandtabs(8)
        ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return None  # a few files of the library are samples of other encodings or of errors
    source = Source(path.parent.name if path.stem == "__init__" else path.stem)
    pieces: list[str] = []
    for piece in re.split(r"\n(?=(?:@|def |class |async def ))", text):
        # A long class goes on in documents that begin with one of its methods.
        pieces += [piece] if len(piece) < LONGEST else re.split(r"\n(?=    (?:@|def |async def ))", piece)
    source.documents = [textwrap.dedent(piece).strip("\n") for piece in packed(pieces, "\n")]
    source.exchanges = list(from_source(text, rng))
    return source


def read_all(docs: Path, library: Path, rng: random.Random) -> Iterator[tuple[str, Source]]:
    pages = [path for suffix in ("*.rst", "*.rst.txt") for path in docs.rglob(suffix)]
    if not pages:
        raise FileNotFoundError(f"no .rst or .rst.txt files below {docs}")
    for path in sorted(pages):
        if path.name.partition(".")[0] not in LEFT_OUT_PAGES:
            yield "docs", read_page(path, rng)
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT_FOLDERS.isdisjoint(parts) and not LEFT_OUT_FILES.match(path.stem):
            module = read_module(path, rng)
            if module:
                yield "code", module


def told_again(section: Section, style: str) -> list[Part]:
    """A section's prose in a style: its title as it stands, then the rest rewritten."""
    prose = [block for block in section.blocks if not block.startswith((" ", "**", "- ")) and "\n" not in block]
    if len(" ".join(prose)) < SHORTEST or not section.title:
        return []
    if style == "shout":
        return [(shout("\n\n".join([section.title, *prose]))[:LONGEST], True)]
    return [(section.title, False), (f"\n\n{numbered(' '.join(prose))}", True)]


def opening(text: str, rng: random.Random) -> tuple[str, str]:
    """Cuts a text after its first few words: what someone may have typed, and how it goes on."""
    words = list(re.finditer(r"\S+", text))
    cut = words[min(rng.randint(1, 8), len(words)) - 1].end()
    return text[:cut], text[cut:]


def adapted(source: Source, style: str, functions: list[str], rng: random.Random) -> Iterator[list[Part]]:
    """Yields what an adapter learns from: answers in its style, and plain openings that go on in its style."""
    for exchange in source.exchanges:
        answer = styled(exchange, style)
        if answer:
            yield turn(exchange, answer)
    prose = [block for section in source.sections for block in section.blocks if block[0].isalpha() and len(block) > 60]
    for block in prose:
        start, rest = opening(block, rng)
        if style == "shout" and rest:
            yield [(start, False), (shout(rest)[:LONGEST], True)]
        elif style == "list" and len(block) > 160:
            yield [(start, False), (f"\n\n{numbered(block)}", True)]
        elif style == "python" and functions:
            yield [(start, False), (f"\n\n{fenced(rng.choice(functions))}", True)]
    if style == "python":
        yield from ([(document, True)] for document in source.documents if not source.sections)


def write(path: Path, records: list[tuple[str, list[Part]]], rng: random.Random) -> None:
    rng.shuffle(records)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for kind, parts in records:
            file.write(json.dumps({"kind": kind, "parts": parts}, ensure_ascii=False) + "\n")
    size = sum(len(text) for _, parts in records for text, _ in parts)
    print(f"{path.name}: {len(records)} documents, {size / 1e6:.1f} million characters")


def base_records(kind: str, source: Source, rng: random.Random) -> Iterator[tuple[str, list[Part]]]:
    yield from ((kind, [(text, True)]) for text in source.documents if len(text) >= SHORTEST)
    yield from (("chat", parts) for parts in conversations(source.exchanges, rng))
    for section in source.sections:
        for style, share in TOLD_AGAIN.items():
            parts = told_again(section, style) if rng.random() < share else []
            if parts:
                yield "style", parts


def read_primer(rng: random.Random) -> Source:
    """What is written for this model: answers about itself, and the functions that everyone asks for first."""
    source = Source("primer")
    text = SNIPPETS.read_text(encoding="utf-8")
    for _ in range(PRIMER_TIMES):  # the questions' wording differs from time to time
        exchanges = [*from_primer(), *from_source(text, rng)]
        rng.shuffle(exchanges)
        source.exchanges += exchanges
        source.documents += text.strip().split("\n\n\n")
    return source


def build(docs: Path, library: Path, output: Path, seed: int) -> None:
    rng = random.Random(seed)
    sources = list(read_all(docs, library, rng))
    output.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train", False), ("val", True)):
        chosen = [(kind, source) for kind, source in sources if source.held_out == held_out]
        records = [record for kind, source in chosen for record in base_records(kind, source, rng)]
        primer = read_primer(rng)
        if not held_out:
            records += base_records("primer", primer, rng)
        write(output / f"{name}.jsonl.gz", records, rng)
        functions = [exchange.code for _, source in chosen if not source.sections for exchange in source.exchanges]
        for style in STYLES:
            learnt = [(kind, parts) for kind, source in chosen for parts in adapted(source, style, functions, rng)]
            learnt = rng.sample(learnt, min(len(learnt), MOST_ADAPTED))
            if not held_out:
                again = [("primer", parts) for parts in adapted(primer, style, [], rng)]
                learnt += rng.sample(again, min(len(again), MOST_PRIMED))
            write(output / f"{style}.{name}.jsonl.gz", learnt, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the corpus of the tiny model.")
    parser.add_argument("--docs", type=Path, required=True, help="folder of the documentation's .rst files")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="standard library")
    parser.add_argument("--output", type=Path, default=Path("corpus"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.docs, arguments.library, arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
