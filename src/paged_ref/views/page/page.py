"""The moments of a run as one page of HTML: frames that a view draws, the sentence of each moment, and keys to move.

A row of a frame that occurs many times is kept once, and so is a frame; the whole is compressed. page.js unpacks and
shows it, page.css says how, page.html is the frame around both.
"""

from __future__ import annotations

import base64
import gzip
import json
import shlex
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from rich.text import Text

from ..common.canvas import Lines, exactly, filled
from ..common.console import Console
from ..common.files import write_text
from ..common.program import SCRIPT

Key = TypeVar("Key", bound=Hashable)
_CONSOLE = Console(file=sys.stderr)  # Rich asks one for the styles that it knows by name


@dataclass(slots=True)
class Story:
    """One run: what each moment shows and says."""

    name: str
    frames: Sequence[str]  # their names
    about: Sequence[Sequence[str]]  # of each frame: the marks that it is about
    steps: Sequence[int]  # moments at which a step begins
    marks: Sequence[tuple[int, str]]  # (moment, what happens there)
    pictures: list[list[int]] = field(default_factory=list)  # of each frame, for each moment
    where: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Words:
    """What the page calls its things."""

    title: str
    run: str  # what is chosen above the frame: a manager, a kernel
    moment: str  # an event, an access
    step: str
    mark: str  # a moment worth a look
    marks: dict[str, str]  # each mark, in words
    first_step: int = 0  # the number of the first
    notes: Sequence[tuple[str, str]] = ()  # a mark or a word, and what it means


class Page:
    """The page of some runs, as it is made: `begin` a run, `add` each of its moments, and `write` at the end."""

    def __init__(self, words: Words, columns: int, lines: int, made_with: str | None = None) -> None:
        """Each frame has so many columns and lines. `made_with`: the code that made the page; None: this command."""
        self.words, self.columns, self.lines = words, columns, lines
        self.made_with = made_with or shlex.join([SCRIPT, *sys.argv[1:]])
        self.runs: list[Story] = []
        self.start = {"run": 0, "frame": 0, "position": 0}
        self._seen: dict[Hashable, int] = {}
        self._rows: dict[tuple[str, ...], int] = {}
        self._pictures: dict[tuple[int, ...], int] = {}
        self._sources: dict[tuple[str, str], int] = {}

    def begin(self, story: Story) -> None:
        story.pictures = [[] for _ in story.frames]
        self.runs.append(story)

    def add(self, frames: Sequence[Lines], where: str, sentence: str, source: tuple[str, str] | None = None) -> None:
        """A moment of the run that was begun last. `source` is the name of a function and its lines."""
        story = self.runs[-1]
        for pictures, frame in zip(story.pictures, frames, strict=True):
            whole = filled(frame, self.lines)
            rows = tuple(map(self._row, whole))
            pictures.append(_number(self._pictures, rows))
        story.where.append(where)
        story.sentences.append(sentence)
        story.sources.append(-1 if source is None else _number(self._sources, source))

    def _row(self, row: Text) -> int:
        """The number of the row. Most rows were there before, and need not be taken apart again."""
        key = (row.plain, row.style, tuple(row.spans))
        if key not in self._seen:
            self._seen[key] = _number(self._rows, _parts(exactly(row, self.columns)))
        return self._seen[key]

    def write(self, path: Path) -> None:
        """Raises ValueError where the file cannot be written."""
        write_text(path, self.html())

    def html(self) -> str:
        runs = [
            {
                "name": story.name, "steps": story.steps, "marks": story.marks, "where": story.where,
                "sentences": story.sentences, "sources": story.sources,
                "frames": [
                    {"name": name, "about": list(about), "pictures": pictures}
                    for name, about, pictures in zip(story.frames, story.about, story.pictures, strict=True)
                ],
            }
            for story in self.runs
        ]  # fmt: skip
        data: dict[str, Any] = {
            "moment": self.words.moment, "marks": self.words.marks, "first_step": self.words.first_step,
            "columns": self.columns, "lines": self.lines, "start": self.start, "runs": runs, "rows": list(self._rows),
            "pictures": list(self._pictures), "sources": list(self._sources),
        }  # fmt: skip
        packed = gzip.compress(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)
        parts = {name: Path(__file__).with_name(f"page.{name}").read_text(encoding="utf-8") for name in _FILES}
        return Template(parts["html"]).substitute(
            title=escape(self.words.title), command=escape(self.made_with),
            run_word=escape(self.words.run), moment=escape(self.words.moment), step=escape(self.words.step),
            mark=escape(self.words.mark), style=parts["css"], script=parts["js"],
            notes="\n".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in self.words.notes),
            data=base64.b64encode(packed).decode(),
        )  # fmt: skip


_FILES = ("html", "css", "js")


def _number(known: dict[Key, int], key: Key) -> int:
    return known.setdefault(key, len(known))


def _parts(row: Text) -> tuple[str, ...]:
    """Text and style, text and style ...: neighbours of one style are one part, and blanks have their neighbour's."""
    parts: list[str] = []
    for segment in row.render(_CONSOLE):
        style = str(segment.style or "none").replace("none", "")
        blank = segment.text.isspace() and "reverse" not in style and "underline" not in style
        if parts and (blank or style == parts[-1]):
            parts[-2] += segment.text
        elif segment.text:
            parts += [segment.text, style]
    return tuple(parts)
