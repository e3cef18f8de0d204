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
from typing import TypeVar

from rich.text import Text

from ..common.canvas import Lines, exactly, filled
from ..common.console import Console
from ..common.files import write_text
from ..common.program import SCRIPT

Key = TypeVar("Key", bound=Hashable)
_CONSOLE = Console(file=sys.stderr)  # Rich asks one for the styles that it knows by name


@dataclass
class StoryFrame:
    """One frame through a whole run."""

    name: str
    about: Sequence[str]  # the marks that it is about
    pictures: list[int] = field(default_factory=list)  # of each moment


@dataclass
class Story:
    """One run: what each moment shows and says. page.js reads it by these names."""

    name: str
    frames: Sequence[StoryFrame]
    steps: Sequence[int]  # moments at which a step begins
    marks: Sequence[tuple[int, str]]  # (moment, what happens there)
    where: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Labels:
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
    """The page of some runs, as it is made: to `runs` a story is appended, `add` gets each of its moments, and `write`
    comes at the end."""

    def __init__(self, labels: Labels, columns: int, lines: int, made_with: str | None = None) -> None:
        """Each frame has so many columns and lines. `made_with`: the code that made the page; None: this command."""
        self.labels, self.columns, self.lines = labels, columns, lines
        self.made_with = made_with or shlex.join([SCRIPT, *sys.argv[1:]])
        self.runs: list[Story] = []
        self.start = {"run": 0, "frame": 0, "position": 0}
        self._seen: dict[Hashable, int] = {}
        self._rows: dict[tuple[str, ...], int] = {}
        self._pictures: dict[tuple[int, ...], int] = {}
        self._sources: dict[tuple[str, str], int] = {}

    def add(self, frames: Sequence[Lines], where: str, sentence: str, source: tuple[str, str] | None = None) -> None:
        """The next moment of the last run: its frames as drawn. `source` is the name of a function and its lines."""
        story = self.runs[-1]
        for of_story, frame in zip(story.frames, frames, strict=True):
            rows = tuple(map(self._row, filled(frame, self.lines)))
            of_story.pictures.append(_number(self._pictures, rows))
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
        labels = self.labels
        data = {
            "moment": labels.moment, "marks": labels.marks, "first_step": labels.first_step, "columns": self.columns,
            "lines": self.lines, "start": self.start, "runs": self.runs, "rows": list(self._rows),
            "pictures": list(self._pictures), "sources": list(self._sources),
        }  # fmt: skip
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=vars)
        html, css, js = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
        page = Template(html).substitute(
            title=escape(labels.title), command=escape(self.made_with), run_word=escape(labels.run),
            moment=escape(labels.moment), step=escape(labels.step), mark=escape(labels.mark), style=css, script=js,
            notes="\n".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in labels.notes),
            data=base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode(),
        )  # fmt: skip
        write_text(path, page)


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
