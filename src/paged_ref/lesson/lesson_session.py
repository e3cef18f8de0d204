"""The session of one lesson: what it asks and prints, and the exercises that it has come to."""

from __future__ import annotations

import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from ..views.common.console import Console
from .grading import Verdict
from .progress import Progress


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


@dataclass(slots=True)
class LessonSession:
    """One run of one lesson."""

    lesson: str  # the name of the lesson's file, without .py
    directory: Path  # of that file
    progress: Progress
    interactive: bool  # a reader can answer
    solutions: bool = False  # every hole is filled from lessons/solutions
    console: Console = field(default_factory=lambda: Console(highlight=False))
    exercises: dict[str, Exercise] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)  # exercises of the part that is running
    caught: dict[str, str] = field(default_factory=dict)  # planted bug -> what caught it
    before_ask: Callable[[], None] = lambda: None  # prints what was held back, so that the reader sees it first

    def say(self, text: str, style: str = "", indent: int = 2) -> None:
        padded = Padding(Text(text, style), (0, 0, 0, indent), expand=False)
        self.console.print(padded, width=min(self.console.width, 100))

    def ask(self, prompt: str) -> str | None:
        """A line typed by the reader; None at the end of input."""
        self.before_ask()
        try:
            return input(prompt).strip()
        except EOFError:
            print()
            return None

    def solution(self, name: str) -> tuple[Callable[..., Any], str] | None:
        """The function of this name in lessons/solutions, and its source."""
        path = self.directory / "solutions" / f"{self.lesson}.py"
        if not path.is_file():
            return None
        function = runpy.run_path(str(path)).get(name)
        return (function, inspect.getsource(function).rstrip()) if function else None


def python_code(source: str) -> Padding:
    """The source with colours, for a Console to print."""
    return Padding(Syntax(source, "python", theme="ansi_dark", word_wrap=True), (0, 0, 0, 2), expand=False)


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
        _current = LessonSession(path.stem, path.parent, Progress(), interactive)
        sys.excepthook = _without_traceback(sys.excepthook)
    return _current


def _without_traceback(hook: Any) -> Any:
    """An excepthook that prints one sentence for Ctrl-C and for a claim that does not hold."""

    def shown(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nInterrupted. What you did so far is kept.", file=sys.stderr)
        elif issubclass(kind, ClaimError):
            print(f"\n{error}", file=sys.stderr)
        else:
            hook(kind, error, trace)

    return shown
