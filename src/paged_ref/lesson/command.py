"""`paged-ref lesson`: the list of lessons with what is done, or one of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.table import Table

from ..views.common.console import Console
from ..views.common.program import program
from . import lesson_script
from .lesson_player import Leave, LessonPlayer, error_text, watch
from .lesson_session import LessonSession, relative_path
from .progress import LessonRecord, Progress

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
    paths = {int(path.name[:2]): path for path in lesson_script.find(_directory(args.lessons))}
    progress = Progress()
    try:
        return _run(args, paths, progress)
    finally:
        for warning in progress.warnings:
            print(f"paged-ref lesson: {warning}", file=sys.stderr)


def _run(args: argparse.Namespace, paths: dict[int, Path], progress: Progress) -> int:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    number = args.number
    if number is None:
        for name in ("part", "solutions", "watch"):
            if getattr(args, name):
                raise ValueError(f"--{name} needs the number of a lesson, as in {program()} lesson 5 --{name}")
        number = _choose(paths, progress, interactive)
        if number is None:
            return 0
    if args.watch and args.part is not None:
        raise ValueError(f"--part is {args.part}; --watch runs the whole lesson, so give one of the two")
    if number not in paths:
        raise ValueError(f"lesson is {number}; known are {min(paths)} to {max(paths)}")
    path = paths[number]

    def make_session(asks: bool = False) -> LessonSession:
        return LessonSession(path.stem, path.parent, progress, asks, args.solutions)

    try:
        if args.watch:
            watch(path, make_session)
        return _play(path, make_session(interactive), args.part)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What you did is kept: {program()} lesson {number} goes on from here.")
        return 130


def _play(path: Path, session: LessonSession, part: int | None) -> int:
    try:
        player = LessonPlayer(path, session)
    except SyntaxError as error:
        session.say(error_text(error), "red")
        return 1
    lesson = player.script
    again = f"{program()} lesson {lesson.number}"
    if part is not None and not 1 <= part <= len(lesson.parts):
        raise ValueError(f"--part is {part}; lesson {lesson.number} has the parts 1 to {len(lesson.parts)}")
    if part is None:
        part = session.progress.of(session.lesson).part if session.interactive else 1
    try:
        if not player.play(part):
            return 1
    except Leave:
        session.say(f"Left. {again} goes on from here.", "dim")
        return 0
    if still_open := [name for name, exercise in session.exercises.items() if exercise.verdict.state != "right"]:
        session.say(f"The lesson is at its end; {', '.join(still_open)} is still open. Write it in", "cyan")
        session.say(f"{relative_path(path)}, with {again} --watch beside the editor.", "cyan")
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


def _choose(paths: dict[int, Path], progress: Progress, interactive: bool) -> int | None:
    """Print all lessons and what is done; the number of the lesson that the reader chooses, if any."""
    console = Console(highlight=False)
    drawn = Table("", "lesson", "min", "read", "exercise", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.columns[0].justify = drawn.columns[2].justify = "right"
    following = None
    for number, path in paths.items():
        record = progress.of(path.stem)
        drawn.add_row(str(number), *_row(path, record, path.stem in progress.lessons))
        if following is None and (record.part > 0 or not record.exercises):
            following = number
    console.print(drawn)
    if following is None:
        console.print(f"All are done. {program()} lesson N runs one again.", soft_wrap=True)
        return None
    console.print(f"Go on with: {program()} lesson {following}", soft_wrap=True)
    if not interactive:
        return None
    try:
        typed = input("[Enter: go on   a number: that lesson   q: leave] ").strip()
    except EOFError:
        return None
    if typed.isdigit():
        return int(typed)
    return None if typed else following


def _row(path: Path, record: LessonRecord, begun: bool) -> tuple[str, str, str, str]:
    """A lesson of the list: title, minutes, how far it was read, whether its exercise is solved."""
    try:
        lesson = lesson_script.read(path)
    except (SyntaxError, ValueError):
        return path.stem, "", "not readable", ""
    reading = "" if not begun else f"part {record.part}" if record.part else "to the end"
    return lesson.title, str(lesson.minutes), reading, "✓ solved" if record.exercises else ""
