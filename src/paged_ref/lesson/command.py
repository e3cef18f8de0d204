"""`paged-ref lesson`: the list of lessons with what is done, or one of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from rich import box
from rich.table import Table

from ..views.common.console import Console
from ..views.common.files import check_folder
from ..views.common.program import program, short_path
from . import lesson_script
from .grade_file import MARKS, grade_file
from .lesson_code import file_problem, watch
from .lesson_player import LessonPlayer
from .lesson_session import Leave, LessonSession, read_line, relative_path
from .progress import LessonRecord, Progress

_CHECKOUT = Path(__file__).resolve().parents[3] / "lessons"
_INSTALLED = Path(__file__).resolve().parents[1] / "lessons"  # in an installed package: see pyproject.toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("number", nargs="?", type=int, metavar="N", help="the lesson to run (default: the list)")
    parser.add_argument("--part", type=int, metavar="P", help="begin with this part (default: where you stopped)")
    parser.add_argument("--solutions", action="store_true", help="with the exercises solved, from lessons/solutions")
    parser.add_argument(
        "--grade",
        type=Path,
        metavar="FILE",
        help="grade a lesson's file, or my_cache.py and the like, and keep no progress: status 1 if wrong",
    )
    parser.add_argument("--json", action="store_true", help="with --grade: the grades as JSON")
    parser.add_argument("--watch", action="store_true", help="run the lesson again each time its file is saved")
    parser.add_argument(
        "--lessons",
        type=Path,
        metavar="DIR",
        help="the folder of the lessons (default: lessons/, or the installed one)",
    )
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy the lessons to this new folder, to edit them")


def main(args: argparse.Namespace) -> int:
    if args.copy is not None:
        return _copy(_directory(args.lessons), args.copy)
    if args.grade is not None:
        return _grade(args)
    if args.json:
        raise ValueError("--json is given; it goes with --grade FILE")
    paths = {int(path.name[:2]): path for path in lesson_script.find(_directory(args.lessons))}
    progress = Progress()
    try:
        return _run(args, paths, progress)
    finally:
        for warning in progress.warnings:
            print(f"paged-ref lesson: {warning}", file=sys.stderr)


def _grade(args: argparse.Namespace) -> int:
    """Status 1 if an exercise of the file is wrong, 0 if all are right or open."""
    for name, option in (("number", "number"), ("part", "--part"), ("solutions", "--solutions"), ("watch", "--watch")):
        if getattr(args, name):
            raise ValueError(f"--grade is {args.grade}, and {option} is given; the two do not go together")
    grades = grade_file(args.grade, lambda: _directory(args.lessons))
    if args.json:
        print(json.dumps([dataclasses.asdict(grade) for grade in grades], indent=2))
    for each in grades if not args.json else ():
        print("\n    ".join([f"{MARKS[each.state]} {each.name}: {each.state}", *each.said]))
    return 1 if any(each.state == "wrong" for each in grades) else 0


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
        raise ValueError(f"lesson is {number}; known are {_known(paths)}")
    path = paths[number]

    def make_session(asks: bool = False) -> LessonSession:
        reader = asks or args.watch
        return LessonSession(path.stem, path.parent, progress, asks, args.solutions, makes_files=reader)

    try:
        if args.watch:
            watch(path, make_session)
        following = next((paths[n] for n in paths if n > number), None)
        return _play(path, make_session(interactive), args.part, following)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What you did is kept. {_goes_on(path, number, progress)}")
        return 130


def _goes_on(path: Path, number: int, progress: Progress) -> str:
    part = progress.of(path.stem).part
    return f"{program()} lesson {number} goes on with part {part}." if part else f"Lesson {number} stays done."


def _play(path: Path, session: LessonSession, part: int | None, following: Path | None) -> int:
    """Play the lesson from this part on (None: where the reader was). At its end, name the following one."""
    try:
        player = LessonPlayer(path, session)
    except (SyntaxError, OSError) as error:
        session.say(file_problem(path, error), "red")
        return 1
    lesson = player.code.script
    again = f"{program()} lesson {lesson.number}"
    if part is not None and not 1 <= part <= len(lesson.parts):
        raise ValueError(f"--part is {part}; lesson {lesson.number} has the parts 1 to {len(lesson.parts)}")
    if part is None:
        part = session.progress.of(session.lesson).part if session.interactive else 1
    try:
        if not player.play(part):
            return 1
    except Leave:
        session.say(f"Left. {_goes_on(path, lesson.number, session.progress)}", "dim")
        return 0
    if to_do := session.to_do:
        names = ", ".join(exercise.name for exercise in to_do)
        files = ", ".join(dict.fromkeys(relative_path(exercise.file) for exercise in to_do))
        session.say(f"The lesson is at its end. Still to write: {names}, in", "cyan")
        session.say(f"{files}, with {again} --watch beside the editor.", "cyan")
    elif session.exercises and not session.solutions:
        session.say(f"Solved. {_following(following)}", "bold green")
    return 1 if any(exercise.verdict.state == "wrong" for exercise in session.exercises.values()) else 0


def _following(path: Path | None) -> str:
    if path is None:
        return "This was the last lesson."
    try:
        lesson = lesson_script.read(path)
    except (SyntaxError, ValueError, OSError):
        return ""
    return f"Next: {program()} lesson {lesson.number}, {lesson.title}."


def _directory(given: Path | None) -> Path:
    """The folder of the lessons. Raises ValueError, which says where the lessons are, if it is not found."""
    if given is not None:
        if not lesson_script.find(given):
            raise ValueError(f"--lessons is {given}; no file NN_name.py is in it")
        return given
    for directory in (_CHECKOUT, Path("lessons").resolve(), _INSTALLED):
        if lesson_script.find(directory):
            return directory
    raise ValueError(
        "the lessons are files to read and to edit, in the folder lessons/ of the project's repository; this "
        "installation is without them. Run this in a checkout, or name the folder with --lessons DIR"
    )


def _copy(source: Path, target: Path) -> int:
    """The lessons in a folder of the reader's own, where this command finds them if its name is `lessons`."""
    if target.exists():
        raise ValueError(f"--copy is {target}; a folder that does not exist yet is needed, so that no work is lost")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--copy is {target}; a folder outside the lessons, {short_path(source)}, is needed")
    check_folder(target, "--copy")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    where = "" if target.resolve() == Path("lessons").resolve() else f" --lessons {short_path(target)}"
    print(f"The lessons are in {short_path(target)}. Go on with: {program()} lesson 1{where}")
    return 0


def _choose(paths: dict[int, Path], progress: Progress, interactive: bool) -> int | None:
    """Print all lessons and what is done; the number of the lesson that the reader chooses, if any."""
    console = Console(highlight=False)
    drawn = Table("", "lesson", "min", "read", "exercise", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.columns[0].justify = drawn.columns[2].justify = "right"
    following = None
    for number, path in paths.items():
        record = progress.of(path.stem)
        row = _row(path, record, path.stem in progress.lessons)
        drawn.add_row(str(number), *row)
        if following is None and row[2:] != ("to the end", "✓ solved"):
            following = number
    console.print(drawn)
    if any(path.parent == _INSTALLED for path in paths.values()):
        console.print(f"These are the package's own. To edit them: {program()} lesson --copy lessons", soft_wrap=True)
    if following is None:
        console.print(f"All are done. {program()} lesson N runs one again.", soft_wrap=True)
        return None
    console.print(f"Go on with: {program()} lesson {following}", soft_wrap=True)
    while interactive:
        try:
            typed = read_line("[Enter: go on   a number: that lesson   q: leave] ")
        except Leave:
            break
        if not typed or (typed.isdecimal() and int(typed) in paths):
            return int(typed) if typed else following
        console.print(f"{typed!r} is no lesson; {_known(paths)} are.", style="yellow")
    return None


def _known(paths: dict[int, Path]) -> str:
    """Which numbers there are: 1 to 19 and 21."""
    numbers = [*paths]
    starts = [n for n in numbers if n - 1 not in paths]
    ends = [n for n in numbers if n + 1 not in paths]
    return " and ".join(f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def _row(path: Path, record: LessonRecord, begun: bool) -> tuple[str, str, str, str]:
    """A lesson of the list: title, minutes, how far it was read, whether its exercise is solved."""
    try:
        lesson = lesson_script.read(path)
    except (SyntaxError, ValueError, OSError):
        return path.stem, "", "not readable", ""
    reading = "" if not begun else f"part {record.part}" if record.part else "to the end"
    solved = len(record.exercises)
    mark = "✓ solved" if solved >= lesson.exercises else f"{solved} of {lesson.exercises}"
    return lesson.title, str(lesson.minutes), reading, mark if solved else ""
