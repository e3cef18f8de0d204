"""A lesson's file, taken apart: its head, and parts of prose and code. lessons/STYLE.md states the form."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .harness import harness_lines

Kind = Literal["prose", "code"]
Lines = tuple[Kind, int, int]  # what stands there, first line, last line

_NAME = re.compile(r"(\d\d)_\w+\.py")
MAX_ROWS = 20  # of code that is shown and run as one: with the output it should fit a screen of 24 rows
_HEAD = re.compile(r"Lesson (\d+): (.+?)\n\nQuestion: (.+?)\nTime: (\d+) minutes\.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of comment paragraphs, or of statements."""

    kind: Kind
    text: str  # prose: Markdown, without the #
    line: int = 1  # of the file, on which code begins
    harness: tuple[int, ...] = ()  # lines of the code, from 1, that only prepare or print


@dataclass(frozen=True, slots=True)
class Part:
    """What stands under one `# ## heading`."""

    title: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class LessonScript:
    """One lesson."""

    path: Path
    number: int
    title: str
    question: str
    minutes: int
    head: str  # the docstring, Markdown
    exercises: int  # calls of check() and build()
    imports: Part  # what stands before the first heading
    parts: tuple[Part, ...]


def read(path: Path) -> LessonScript:
    """The lesson in this file. Raises SyntaxError if Python cannot parse it, ValueError if the head is not one."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path))
    head = ast.get_docstring(tree) or ""
    found = _HEAD.match(head)
    if not found:
        raise ValueError(f"{path.name} does not begin as a lesson does: 'Lesson N: title', 'Question: ', 'Time: '")
    question = " ".join(found[3].split())
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    exercises = called.count("check") + called.count("build")
    imports, *parts = _parts(source, tree)
    return LessonScript(path, int(found[1]), found[2], question, int(found[4]), head, exercises, imports, tuple(parts))


def find(directory: Path) -> list[Path]:
    """The lessons' files in this folder, in order."""
    return sorted(path for path in directory.glob("*.py") if _NAME.fullmatch(path.name))


def execute(passage: Passage, path: Path, namespace: dict[str, Any]) -> None:
    """Run a passage of code; errors in it name the lesson's file and line."""
    source = "\n" * (passage.line - 1) + passage.text
    exec(compile(source, str(path), "exec", dont_inherit=True), namespace)


def _parts(source: str, tree: ast.Module) -> Iterator[Part]:
    """What stands before the first heading, and then the parts."""
    title, passages = "", list[Passage]()
    for passage in _passages(source, tree):
        if passage.kind == "prose" and passage.text.startswith("## "):
            if passages or not title:
                yield Part(title, tuple(passages))
            heading, _, text = passage.text.partition("\n")
            title, passages = heading[3:].strip(), []
            if not text.strip():
                continue
            passage = Passage("prose", text.strip())
        passages.append(passage)
    if passages or not title:
        yield Part(title, tuple(passages))


def _passages(source: str, tree: ast.Module) -> Iterator[Passage]:
    """Prose is a paragraph of comment lines with blank lines around it. All else is code."""
    lines, harness = source.splitlines(), harness_lines(tree)
    statement_at = {}  # line -> its statement
    for statement in tree.body[1:]:  # the docstring is the head
        decorators = [d.lineno for d in getattr(statement, "decorator_list", [])]
        for number in range(min([statement.lineno, *decorators]), (statement.end_lineno or statement.lineno) + 1):
            statement_at[number] = statement
    for kind, first, last in _joined(_paragraphs(lines, statement_at, (tree.body[0].end_lineno or 1) + 1), lines):
        text = "\n".join(lines[first - 1 : last])
        if kind == "prose":
            yield Passage("prose", re.sub(r"^# ?", "", text, flags=re.MULTILINE))
        else:
            dim = tuple(line - first + 1 for line in range(first, last + 1) if line in harness)
            yield Passage("code", text, first, dim)


def _paragraphs(lines: list[str], statement_at: dict[int, ast.stmt], first: int) -> Iterator[Lines]:
    """From line `first` on, what stands between blank lines. A blank line inside a statement ends nothing."""
    while first <= len(lines):
        if not lines[first - 1].strip():
            first += 1
            continue
        last = first
        while last < len(lines) and (lines[last].strip() or statement_at.get(last) is statement_at.get(last + 1, 0)):
            last += 1
        is_code = any(number in statement_at for number in range(first, last + 1))
        yield "code" if is_code else "prose", first, last
        first = last + 1


def _joined(paragraphs: Iterable[Lines], lines: list[str]) -> list[Lines]:
    """Neighbours of one kind as one; a heading begins anew, and so does code of more than a screen."""
    joined: list[Lines] = []
    for kind, first, last in paragraphs:
        before, start, _ = joined[-1] if joined else ("", 0, 0)
        fits = kind == "prose" or last - start < MAX_ROWS
        if before == kind and fits and not lines[first - 1].startswith("# ## "):
            joined[-1] = (kind, start, last)
        else:
            joined.append((kind, first, last))
    return joined
