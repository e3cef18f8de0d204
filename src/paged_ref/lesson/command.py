"""`paged-ref lesson`: the list of lessons with what is done, or one of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import script
from .player import Leave, Player, told, watch
from .progress import Progress
from .script import Script
from .session import Session, short

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
    paths = script.find(_directory(args.lessons))
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
        number = _list(paths, progress, interactive)
        if number is None:
            return 0
    if args.watch and args.part is not None:
        raise ValueError(f"--part is {args.part}; --watch runs the whole lesson, so give one of the two")
    path = _path(paths, number)

    def make_session(asks: bool = False) -> Session:
        return Session(path.stem, path.parent, progress, asks, args.solutions)

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


def _play(path: Path, session: Session, part: int | None) -> int:
    try:
        player = Player(path, session)
    except SyntaxError as error:
        session.say(told(error), "red")
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
    is_open = [name for name, exercise in session.exercises.items() if exercise.verdict.state != "right"]
    if is_open:
        session.say(
            f"The lesson is at its end; {', '.join(is_open)} is still open. Write it in {short(path)}, with "
            f"paged-ref lesson {lesson.number} --watch beside the editor.",
            "cyan",
        )
    return 0


def _directory(given: Path | None) -> Path:
    """The folder of the lessons. Raises ValueError that says where they are."""
    if given is not None:
        if not script.find(given):
            raise ValueError(f"--lessons is {given}; no file NN_name.py is in it")
        return given
    for directory in (_CHECKOUT, Path("lessons").resolve()):
        if script.find(directory):
            return directory
    raise ValueError(
        "the lessons are files to read and to edit, in the folder lessons/ of the project's repository; they are "
        "not installed with the package. Run this in a checkout, or name the folder with --lessons DIR"
    )


def _path(paths: list[Path], number: int) -> Path:
    for path in paths:
        if int(path.name[:2]) == number:
            return path
    raise ValueError(f"lesson is {number}; known are {int(paths[0].name[:2])} to {int(paths[-1].name[:2])}")


def _list(paths: list[Path], progress: Progress, interactive: bool) -> int | None:
    """Print all lessons and what is done; the number of the one to go on with, where the reader wants to."""
    console = Console(highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("", "right"), ("lesson", "left"), ("min", "right"), ("read", "left"), ("exercise", "left")):
        drawn.add_column(name, justify=justify)  # type: ignore[arg-type]
    following: int | None = None
    for path in paths:
        lesson = _read(path)
        number, part = int(path.name[:2]), progress.part(path.stem)
        solved = progress.solved(path.stem)
        is_begun = progress.was_begun(path.stem)
        reading = "to the end" if is_begun and part == 0 else f"part {part}" if is_begun else ""
        if following is None and (not solved or reading != "to the end"):
            following = number
        if lesson is None:
            drawn.add_row(str(number), path.stem, "", "not readable", "")
        else:
            drawn.add_row(str(number), lesson.title, str(lesson.minutes), reading, "✓ solved" if solved else "")
    console.print(drawn)
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


def _read(path: Path) -> Script | None:
    try:
        return script.read(path)
    except (SyntaxError, ValueError):
        return None
