"""`paged-ref lesson --grade FILE`: the exercises of one file, graded without a reader."""

from __future__ import annotations

import ast
import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..views.common.console import Console
from ..views.common.own_code import error_in_words
from .building import FILES, build_named, grade_build
from .calls import wrong_lines
from .grading import Verdict
from .lesson_code import LessonCode
from .lesson_session import LessonSession, running
from .progress import Progress

MARKS = {"right": "✓", "open": "○", "wrong": "✗"}


@dataclass(frozen=True, slots=True)
class Grade:
    """One exercise of the file."""

    name: str
    state: Literal["right", "open", "wrong"]
    said: list[str] = field(default_factory=list)  # what is wrong, or the size of the hole


def grade_file(path: Path, find_lessons: Callable[[], Path]) -> list[Grade]:
    """The grades of a lesson's file, or of one with something to build, wherever it lies. Nothing is asked or kept.

    Raises ValueError for a file that cannot be read, and for one that has no exercise.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--grade is {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--grade is {path}; it is no text in UTF-8") from None
    try:
        tree = ast.parse(source, filename=str(path))
    except (SyntaxError, ValueError) as error:
        return [Grade(path.name, "wrong", [error_in_words(error, str(path))])]
    defined = {getattr(node, "name", "") for node in tree.body}
    built = [name for _, names in FILES.values() for name in names if name in defined]
    if built:
        with redirect_stdout(io.StringIO()):
            return [_grade(name, *_of_build(name, path)) for name in built]
    if (ast.get_docstring(tree) or "").startswith("Lesson "):
        return _grades_of_lesson(path, find_lessons())
    names = ", ".join(name for _, names in FILES.values() for name in names)
    raise ValueError(f"--grade is {path}; it is no lesson, and defines none of {names}")


def _of_build(name: str, path: Path) -> tuple[Verdict, str, str]:
    verdict, stage = grade_build(build_named(name), path)
    return verdict, f"{stage.title}: {verdict.hole}", str(path)


def _grade(name: str, verdict: Verdict, hole: str, file: str) -> Grade:
    if verdict.state == "wrong":
        return Grade(name, "wrong", list(wrong_lines(verdict, file)))
    return Grade(name, "right") if verdict.state == "right" else Grade(name, "open", [hole])


def _grades_of_lesson(path: Path, lessons: Path) -> list[Grade]:
    """Run the lesson; its own folder stands for the course's, and what was built is looked for beside the file."""
    printed = io.StringIO()
    progress = Progress(Path(os.devnull) / "nowhere")
    session = LessonSession(path.stem, lessons, progress, False, console=Console(file=printed), workplace=path.parent)
    with redirect_stdout(printed), running(session):
        code = LessonCode(path, session)
        code.namespace["__file__"] = str(lessons / path.name)  # what a lesson reads lies beside it in the course
        went_well = code.run_all()
    grades = [
        _grade(name, exercise.verdict, exercise.verdict.hole, str(path)) for name, exercise in session.exercises.items()
    ]
    if not went_well:
        grades.append(Grade(path.name, "wrong", printed.getvalue().splitlines()[-6:]))
    return grades
