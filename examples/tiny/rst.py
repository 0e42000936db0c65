"""reStructuredText to plain text: enough of the markup that Python's documentation uses, and no more."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTH = 4  # indentation of the text below a signature, and of code blocks

# Directives that describe one thing: a signature, then its explanation.
OBJECTS = re.compile(
    r"(function|method|class|data|attribute|exception|decorator|classmethod|staticmethod|coroutinefunction"
    r"|coroutinemethod|abstractmethod|awaitablefunction|c:function|c:macro|c:type|c:member|c:var|opcode|envvar"
    r"|cmdoption|pdbcommand|describe)$"
)
# Those of them whose name means little without the module that holds it.
NAMED_BY_MODULE = frozenset({"function", "decorator", "class", "data", "exception"})
NOBODY = "-"  # the owner of lines that are nested, yet below no class
# Directives whose body is code, kept as it stands.
CODE = frozenset({"code-block", "sourcecode", "testcode", "doctest", "testoutput", "productionlist"})
# Directives whose body is prose, with the words that introduce it.
ADMONITIONS = {
    "note": "Note:",
    "warning": "Warning:",
    "seealso": "See also:",
    "important": "Important:",
    "caution": "Caution:",
    "versionadded": "New in version {}.",
    "versionchanged": "Changed in version {}:",
    "deprecated": "Deprecated since version {}:",
    "availability": "Availability: {}",
    "rubric": "{}",
    "topic": "{}",
    "sidebar": "{}",
    "glossary": "",
}

VERSIONED = frozenset({"versionadded", "versionchanged", "deprecated"})  # a version, then prose on the same line

DIRECTIVE = re.compile(r"^\.\. +([a-z][a-z:-]*)::(?: +(.*))?$")
UNDERLINE = re.compile(r"^([=\-~^\"'*#+`.])\1{2,}\s*$")
BULLET = re.compile(r"^(?:[*+-]|#\.|\d+[.)])\s+")
OPTION = re.compile(r"^:[\w-]+:( .*)?$")
TABLE = re.compile(r"^(?:\+[-=+]+\+|={2,}(?: +={2,})+|\|.*\|)\s*$")


@dataclass(frozen=True)
class Entry:
    """One documented object: its qualified name, its signature and the blocks of its explanation."""

    name: str
    signature: str
    blocks: list[str]


@dataclass
class Section:
    """A heading and the text below it, up to the next heading."""

    title: str
    blocks: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def text(self) -> str:
        return "\n\n".join([self.title, *self.blocks] if self.title else self.blocks)


def inline(text: str) -> str:
    """Replaces roles, links and substitutions by the words a reader would see."""

    def role(match: re.Match[str]) -> str:
        kind, body = match.group(1).rpartition(":")[2], match.group(2)
        shown = re.match(r"^(.*?)\s*<[^>]*>$", body, re.DOTALL)
        if shown:
            return shown.group(1)
        body = body.lstrip("!")
        if body.startswith("~"):
            body = body[1:].rpartition(".")[2]
        if kind in {"func", "meth"} and not body.endswith(")"):
            return f"{body}()"
        return {"pep": "PEP ", "rfc": "RFC ", "issue": "issue ", "gh": "issue "}.get(kind, "") + body

    text = re.sub(r":([a-z][a-z:]*):`([^`]+)`", role, text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>`]*>`__?", r"\1", text)
    text = re.sub(r"`([^`]+)`__?(?!\w)", r"\1", text)
    text = re.sub(r"\s*\[[#\w]+\]_", "", text)
    text = re.sub(r"(?<=\S)  +", " ", text)
    text = re.sub(r"\|(release|version|today)\|", "3.11", text)
    return text.replace(" --- ", " - ").replace("\\ ", "").replace("\\*", "*").replace("\\_", "_")


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def indented(lines: list[str], start: int, base: int) -> int:
    """Returns where the block that is indented deeper than *base* and begins at *start* ends."""
    end = start
    for position in range(start, len(lines)):
        if not lines[position].strip():
            continue
        if indent_of(lines[position]) <= base:
            break
        end = position + 1
    return end


def code(lines: list[str]) -> str:
    body = textwrap.dedent("\n".join(lines)).strip("\n")
    return textwrap.indent(body, " " * WIDTH)


class Reader:
    """Turns one source file into sections. It holds what a heading or a directive leaves for the lines after it."""

    def __init__(self) -> None:
        self.module = ""
        self.sections = [Section("")]

    def read(self, source: str) -> list[Section]:
        for block in self.blocks(source.expandtabs(8).splitlines(), owner=""):
            self.sections[-1].blocks.append(block)
        return [section for section in self.sections if section.title or section.blocks]

    def blocks(self, lines: list[str], owner: str) -> Iterator[str]:
        """Yields the text blocks of *lines*; *owner* is the class that the lines describe, if any."""
        at = 0
        while at < len(lines):
            line = lines[at].strip()
            base = indent_of(lines[at])
            if not line:
                at += 1
            elif line.startswith(".. ") or line == "..":
                end = indented(lines, at + 1, base)
                match = DIRECTIVE.match(line)
                if match:
                    yield from self.directive(match.group(1), match.group(2) or "", lines[at + 1 : end], owner)
                at = end
            elif at + 1 < len(lines) and UNDERLINE.match(lines[at + 1].strip()) and not UNDERLINE.match(line):
                if not owner:
                    self.sections.append(Section(inline(line.strip())))
                at += 2
            elif UNDERLINE.match(line):
                at += 1
            else:
                end = at
                while end < len(lines) and lines[end].strip():
                    end += 1
                yield from self.paragraph(lines[at:end], base, owner)
                if lines[end - 1].rstrip().endswith("::"):
                    bullet = BULLET.match(line)
                    inner = base + len(bullet.group()) if bullet and end == at + 1 else indent_of(lines[end - 1])
                    literal = indented(lines, end, inner)
                    if literal > end:
                        yield code(lines[end:literal])
                    end = max(end, literal)
                at = end

    def paragraph(self, lines: list[str], base: int, owner: str) -> Iterator[str]:
        """Yields one run of lines as prose, list items, a definition or code."""
        first = lines[0].strip()
        if any(TABLE.match(line.strip()) for line in lines):
            return  # a table's columns mean nothing once they are a stream of words
        if first.startswith(">>>"):
            yield code(lines)
            return
        if len(lines) > 1 and indent_of(lines[0]) == base < indent_of(lines[1]) and not BULLET.match(first):
            inner = list(self.blocks(lines[1:], owner or NOBODY))
            yield "\n\n".join([f"{inline(first)}: {inner[0].strip()}" if inner else inline(first), *inner[1:]])
            return
        items: list[list[str]] = [[]]
        for line in lines:
            if BULLET.match(line.strip()):
                items.append([])
            items[-1].append(line.strip())
        for item in filter(None, items):
            text = inline(BULLET.sub("- ", " ".join(item)) if BULLET.match(item[0]) else " ".join(item))
            text = re.sub(r"\s*::$", ":", text)
            if text != ":" and not OPTION.match(text):
                yield text

    def directive(self, name: str, argument: str, body: list[str], owner: str) -> Iterator[str]:
        if name in {"module", "currentmodule"}:
            self.module = argument.strip()
        elif OBJECTS.match(name):
            yield from self.described(name, argument, body, owner)
        elif name in CODE:
            kept = [line for line in body if not OPTION.match(line.strip())]
            if any(line.strip() for line in kept):
                yield code(kept)
        elif name in ADMONITIONS:
            version, _, rest = argument.partition(" ") if name in VERSIONED else (argument, "", "")
            lead = ADMONITIONS[name].format(inline(version).rstrip("."))
            below = textwrap.dedent("\n".join(body)).splitlines()
            inner = [block for block in self.blocks([rest.strip(), *below], owner or NOBODY) if block]
            if inner and not inner[0].startswith(" "):
                yield f"{lead} {inner[0]}".strip()
                yield from inner[1:]
            else:
                yield from [lead, *inner] if lead else inner

    def described(self, kind: str, argument: str, body: list[str], owner: str) -> Iterator[str]:
        """Yields a signature and its indented explanation, and notes the entry in the section."""
        signatures = [argument.strip()]
        while body and body[0].strip() and not body[0].strip().startswith(".. "):
            if not OPTION.match(body[0].strip()):
                signatures.append(body[0].strip())
            body = body[1:]
        signatures = [re.sub(r"\\(.)", r"\1", signature).rstrip("\\ ") for signature in signatures if signature]
        if not signatures:
            return
        name = re.split(r"[(\s]", signatures[0])[0] if not kind.startswith("c:") else signatures[0]
        if kind.startswith("c:"):
            found = re.search(r"(\w+)\s*(?:\(|$)", signatures[0])
            name = found.group(1) if found else name
        elif owner not in {"", NOBODY} and "." not in name:
            name = f"{owner}.{name}"
        elif self.module and kind in NAMED_BY_MODULE and "." not in name:
            name = f"{self.module}.{name}"
        inner = list(self.blocks(body, name.rpartition(".")[2] if kind in {"class", "exception"} else owner or NOBODY))
        if inner:
            self.sections[-1].entries.append(Entry(name, signatures[0], inner))
        bare = name.rpartition(".")[2]
        yield "\n".join(name + text.removeprefix(bare) if text.startswith(bare) else text for text in signatures)
        for block in inner:
            yield textwrap.indent(block, " " * WIDTH)
