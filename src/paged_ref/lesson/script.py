"""A lesson's file, taken apart: its head, and parts of prose and code. lessons/STYLE.md states the form."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_NAME = re.compile(r"(\d\d)_\w+\.py")
_ROWS = 20  # of code that are shown and run as one: with what they print they should fit a screen of 24
_HEAD = re.compile(r"Lesson (\d+): (.+?)\n\nQuestion: (.+?)\nTime: (\d+) minutes\.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A run of comment paragraphs, or of statements."""

    kind: Literal["prose", "code"]
    text: str  # prose: Markdown, the # taken off
    first: int  # number of its first line in the file
    statements: tuple[ast.stmt, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """What stands under one `# ## heading`; before the first, the imports."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """One lesson."""

    path: Path
    number: int
    title: str
    question: str
    minutes: int
    head: str  # the docstring, Markdown
    parts: tuple[Part, ...]


def read(path: Path) -> Script:
    """The lesson in this file. Raises SyntaxError where Python cannot read it, ValueError where the head is not one."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path))
    head = ast.get_docstring(tree) or ""
    found = _HEAD.match(head)
    if not found:
        raise ValueError(f"{path.name} does not begin as a lesson does: 'Lesson N: title', 'Question: ', 'Time: '")
    question = " ".join(found[3].split())
    return Script(path, int(found[1]), found[2], question, int(found[4]), head, tuple(_parts(source, tree)))


def find(directory: Path) -> list[Path]:
    """The lessons' files in this folder, in order."""
    return sorted(path for path in directory.glob("*.py") if _NAME.fullmatch(path.name))


def execute(block: Block, path: Path, namespace: dict[str, Any]) -> None:
    """Run a block of code, as a part of the file that it stands in."""
    module = ast.Module(body=list(block.statements), type_ignores=[])
    exec(compile(module, str(path), "exec", dont_inherit=True), namespace)


def _parts(source: str, tree: ast.Module) -> Iterator[Part]:
    title, blocks = "What it uses", list[Block]()
    for block in _blocks(source, tree):
        if block.kind == "prose" and block.text.startswith("## "):
            if blocks:
                yield Part(title, tuple(blocks))
            heading, _, text = block.text.partition("\n")
            title, blocks = heading[3:].strip(), []
            if not text.strip():
                continue
            block = Block("prose", text.strip(), block.first + 1)
        blocks.append(block)
    if blocks:
        yield Part(title, tuple(blocks))


def _blocks(source: str, tree: ast.Module) -> Iterator[Block]:
    """Prose is a paragraph of comment lines with nothing but blank lines around it. All else is code."""
    lines = source.splitlines()
    statement_at = {}  # line -> its statement
    for statement in tree.body[1:]:  # the docstring is the head
        decorators = [d.lineno for d in getattr(statement, "decorator_list", [])]
        for number in range(min([statement.lineno, *decorators]), (statement.end_lineno or statement.lineno) + 1):
            statement_at[number] = statement
    end = tree.body[0].end_lineno or 1
    for kind, first, last in _runs(lines, statement_at, end + 1):
        text = "\n".join(lines[first - 1 : last])
        if kind == "prose":
            yield Block("prose", re.sub(r"^# ?", "", text, flags=re.MULTILINE), first)
        else:
            inside = dict.fromkeys(statement_at[n] for n in range(first, last + 1) if n in statement_at)
            yield Block("code", text, first, tuple(inside))


def _runs(
    lines: list[str], statement_at: dict[int, ast.stmt], begin: int
) -> Iterator[tuple[Literal["prose", "code"], int, int]]:
    """(kind, first line, last line). A new run begins with a heading, a change of kind, and where code gets long."""
    paragraphs = list[tuple[Literal["prose", "code"], int, int]]()
    first = begin
    while first <= len(lines):
        if not lines[first - 1].strip():
            first += 1
            continue
        last = first
        while last < len(lines) and (lines[last].strip() or statement_at.get(last) is statement_at.get(last + 1, 0)):
            last += 1
        is_code = any(number in statement_at for number in range(first, last + 1))
        paragraphs.append(("code" if is_code else "prose", first, last))
        first = last + 1
    run: tuple[Literal["prose", "code"], int, int] | None = None
    for kind, first, last in paragraphs:
        fits = kind == "prose" or (run is not None and last - run[1] < _ROWS)
        if run is not None and run[0] == kind and fits and not lines[first - 1].startswith("# ## "):
            run = (kind, run[1], last)
        else:
            if run is not None:
                yield run
            run = (kind, first, last)
    if run is not None:
        yield run
