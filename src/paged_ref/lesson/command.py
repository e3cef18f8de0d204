"""`paged-ref lesson`: the list of lessons with what is done, or one of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import lesson_script
from .lesson_player import Leave, LessonPlayer, error_text, watch
from .lesson_session import LessonSession, relative_path
from .progress import Progress

_CHECKOUT = Path(__file__).resolve().parents[3] / "lessons"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("number", nargs="?", type=int, metavar="N", help="the lesson to run (default: the list)")
    parser.add_argument("--part", type=int, metavar="P", help="begin with this part (default: where you stopped)")
    parser.add_argument("--solutions", action="store_true", help="with the exercises solved, from lessons/solutions")
    parser.add_argument("--watch", action="store_true", help="run the lesson again each time its file is saved")
    parser.add_argument(
        "--lessons", type=Path, metavar="DIR", help="the folder of the lessons (default: the checkout's)"
    )


def main(args: argparse.Namespace) -> int:
    paths = lesson_script.find(_directory(args.lessons))
    progress = Progress()
    for warning in progress.warnings:
        print(f"paged-ref lesson: {warning}", file=sys.stderr)
    known = len(progress.warnings)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    number = args.number
    if number is None:
        for name in ("part", "solutions", "watch"):
            if getattr(args, name):
                raise ValueError(f"--{name} needs the number of a lesson, as in paged-ref lesson 5 --{name}")
        number = _choose(paths, progress, interactive)
        if number is None:
            return 0
    if args.watch and args.part is not None:
        raise ValueError(f"--part is {args.part}; --watch runs the whole lesson, so give one of the two")
    path = _path(paths, number)

    def make_session(asks: bool = False) -> LessonSession:
        return LessonSession(path.stem, path.parent, progress, asks, args.solutions)

    try:
        if args.watch:
            watch(path, make_session)
        return _play(path, make_session(interactive), args.part)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What you did is kept: paged-ref lesson {number} goes on from here.")
        return 130
    finally:
        for warning in progress.warnings[known:]:
            print(f"paged-ref lesson: {warning}", file=sys.stderr)


def _play(path: Path, session: LessonSession, part: int | None) -> int:
    try:
        player = LessonPlayer(path, session)
    except SyntaxError as error:
        session.say(error_text(error), "red")
        return 1
    lesson = player.script
    if part is not None and not 1 <= part <= len(lesson.parts):
        raise ValueError(f"--part is {part}; lesson {lesson.number} has the parts 1 to {len(lesson.parts)}")
    if part is None:
        part = session.progress.part(session.lesson) if session.interactive else 1
    try:
        if not player.play(part):
            return 1
    except Leave:
        session.say(f"Left. paged-ref lesson {lesson.number} goes on from here.", "dim")
        return 0
    still_open = [name for name, exercise in session.exercises.items() if exercise.verdict.state != "right"]
    if still_open:
        session.say(
            f"The lesson is at its end; {', '.join(still_open)} is still open. Write it in {relative_path(path)}, with "
            f"paged-ref lesson {lesson.number} --watch beside the editor.",
            "cyan",
        )
    return 0


def _directory(given: Path | None) -> Path:
    """The folder of the lessons. Raises ValueError, which says where the lessons are, if it is not found."""
    if given is not None:
        if not lesson_script.find(given):
            raise ValueError(f"--lessons is {given}; no file NN_name.py is in it")
        return given
    for directory in (_CHECKOUT, Path("lessons").resolve()):
        if lesson_script.find(directory):
            return directory
    raise ValueError(
        "the lessons are files to read and to edit, in the folder lessons/ of the project's repository; they are "
        "not installed with the package. Run this in a checkout, or name the folder with --lessons DIR"
    )


def _path(paths: list[Path], number: int) -> Path:
    for path in paths:
        if _number(path) == number:
            return path
    raise ValueError(f"lesson is {number}; known are {_number(paths[0])} to {_number(paths[-1])}")


def _choose(paths: list[Path], progress: Progress, interactive: bool) -> int | None:
    """Print all lessons and what is done; the number of the lesson that the reader chooses, if any."""
    console = Console(highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("", "right"), ("lesson", "left"), ("min", "right"), ("read", "left"), ("exercise", "left")):
        drawn.add_column(name, justify=justify)  # type: ignore[arg-type]
    for path in paths:
        drawn.add_row(*_row(path, progress))
    console.print(drawn)
    following = next((_number(path) for path in paths if not _is_done(path, progress)), None)
    if following is None:
        console.print("All are done. paged-ref lesson N runs one again.")
        return None
    console.print(f"Go on with: paged-ref lesson {following}")
    if not interactive:
        return None
    try:
        typed = input("[Enter: go on   a number: that lesson   q: leave] ").strip()
    except EOFError:
        return None
    if typed.isdigit():
        return int(typed)
    return None if typed else following


def _row(path: Path, progress: Progress) -> tuple[str, ...]:
    """One lesson of the list: number, title, minutes, how far it was read, whether its exercise is solved."""
    try:
        lesson = lesson_script.read(path)
    except (SyntaxError, ValueError):
        return str(_number(path)), path.stem, "", "not readable", ""
    part = progress.part(path.stem)
    reading = "" if not progress.was_begun(path.stem) else f"part {part}" if part else "to the end"
    solved = "✓ solved" if progress.solved(path.stem) else ""
    return str(lesson.number), lesson.title, str(lesson.minutes), reading, solved


def _is_done(path: Path, progress: Progress) -> bool:
    """Read to the end, and the exercise solved."""
    return progress.part(path.stem) == 0 and bool(progress.solved(path.stem))


def _number(path: Path) -> int:
    return int(path.name[:2])
