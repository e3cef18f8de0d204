"""The session of one lesson: what it asks and prints, and the exercises that it has come to."""

from __future__ import annotations

import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from ..views.common.console import Console
from ..views.common.streams import OUTPUT, PlainStream
from .grading import Verdict
from .progress import Progress

_THEME = Theme({"markdown.code": "bold"})  # Rich's is cyan on black, which a light terminal shows as bars


class Leave(Exception):  # noqa: N818  (the reader's wish, not an error)
    """The reader leaves the lesson, to go on another time."""


class ClaimError(Exception):
    """A lesson claims what its run does not show."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One check() and its verdict."""

    name: str
    spec: Callable[..., Any]
    cases: Sequence[tuple[Any, ...]]
    hint: str
    verdict: Verdict
    file: Path  # that the reader writes in


class CountedOutput:
    """What is behind standard output, with its rows counted. While `held` is a list, text is kept there."""

    def __init__(self) -> None:
        self.stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
        self.rows = 0
        self.held: list[str] | None = None

    def write(self, text: str) -> int:
        if self.held is not None:
            self.held.append(text)
            return len(text)
        self.rows += text.count("\n")
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def redirected(self) -> AbstractContextManager[Any]:
        """Standard output goes here, that of print() and that of Rich."""
        return redirect_stdout(cast(TextIO, PlainStream(cast(TextIO, self), OUTPUT)))


@dataclass(slots=True)
class LessonSession:
    """One run of one lesson."""

    lesson: str  # the name of the lesson's file, without .py
    directory: Path  # of that file
    progress: Progress
    interactive: bool  # a reader can answer
    solutions: bool = False  # every hole is filled from lessons/solutions
    console: Console = field(default_factory=lambda: Console(highlight=False, theme=_THEME))
    exercises: dict[str, Exercise] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)  # exercises of the part that is running
    caught: dict[str, str] = field(default_factory=dict)  # planted bug -> what caught it
    workplace: Path = field(default_factory=Path.cwd)  # where the reader's own files are
    makes_files: bool = False  # a reader is there, for whom templates become files
    files: list[Path] = field(default_factory=list)  # of the reader, that the lesson has read
    hints_given: dict[str, int] = field(default_factory=dict)  # exercise -> how many
    before_ask: Callable[[], None] = lambda: None  # prints what was held back, so that the reader sees it first
    after_ask: Callable[[], None] = lambda: None  # says that the code runs on

    @property
    def to_do(self) -> list[Exercise]:
        """The exercises that are open or wrong. The package's own stands in for them."""
        return [exercise for exercise in self.exercises.values() if exercise.verdict.state != "right"]

    def say(self, text: str, style: str = "", indent: int = 2) -> None:
        padded = Padding(Text(text, style), (0, 0, 0, indent), expand=False)
        self.console.print(padded, width=min(self.console.width, 100))

    def ask(self, prompt: str) -> str:
        """A line typed by the reader while code runs. Raises Leave at q and at the end of input."""
        self.before_ask()
        typed = read_line(prompt)
        self.after_ask()
        return typed

    def solution(self, name: str) -> tuple[Callable[..., Any], str] | None:
        """The function of this name in lessons/solutions, and its source."""
        path = self.directory / "solutions" / f"{self.lesson}.py"
        if not path.is_file():
            return None
        function = runpy.run_path(str(path)).get(name)
        return (function, inspect.getsource(function).rstrip()) if function else None


def read_line(prompt: str) -> str:
    """A line typed by the reader. Raises Leave at q and at the end of input."""
    try:
        typed = input(prompt).strip()
    except EOFError:
        print()
        raise Leave from None
    if typed.lower() in ("q", "quit", "exit"):
        raise Leave
    return typed


def python_code(source: str, dim: Iterable[int] = ()) -> Padding:
    """The source with colours, for a Console to print. The lines `dim`, from 1, are less bright."""
    code = Syntax(source, "python", theme="ansi_dark", word_wrap=True)
    for line in dim:
        code.stylize_range("dim", (line, 0), (line + 1, 0))
    return Padding(code, (0, 0, 0, 2), expand=False)


def relative_path(path: str | Path) -> str:
    """The path as the reader would type it in this folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


# --- the current session -------------------------------------------------------------------------------

_current: LessonSession | None = None


@contextmanager
def running(session: LessonSession) -> Iterator[None]:
    """Make `session` the current one for a while."""
    global _current
    before, _current = _current, session
    try:
        yield
    finally:
        _current = before


def current() -> LessonSession:
    """The current session. `python lessons/NN_name.py` has none, and gets one for that script."""
    global _current
    if _current is None:
        path = Path(getattr(sys.modules["__main__"], "__file__", None) or "lesson.py").resolve()
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        _current = LessonSession(path.stem, path.parent, Progress(), interactive, makes_files=interactive)
        sys.excepthook = _without_traceback(sys.excepthook)
    return _current


def _without_traceback(hook: Any) -> Any:
    """An excepthook that prints one sentence for Ctrl-C and for a claim that does not hold."""

    def shown(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nInterrupted. What you did so far is kept.", file=sys.stderr)
        elif issubclass(kind, Leave):
            print("Left. What you did so far is kept.", file=sys.stderr)
        elif issubclass(kind, ClaimError):
            print(f"\n{error}", file=sys.stderr)
        else:
            hook(kind, error, trace)

    return shown
