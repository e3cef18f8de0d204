"""What a reader builds in a file of their own: the file is made from a template, graded in stages, and used.

A thing to build is a `Build`. kernel_building.py, scheduler_building.py and cache_building.py list theirs.
"""

from __future__ import annotations

import importlib
import linecache
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .calls import say_wrong
from .grading import Pending, Verdict, grade
from .lesson_session import Exercise, LessonSession, current, relative_path


@dataclass(frozen=True, slots=True)
class Stage:
    """Cases that belong together, the easiest stage first."""

    title: str
    cases: list[tuple[Any, ...]]
    hint: str


@dataclass(frozen=True, slots=True)
class Build:
    """A function or a class of a reader's file, and how it is tried."""

    name: str
    stages: list[Stage]
    spec: Callable[..., Any]  # a case -> what is right
    trial: Callable[[Any], Callable[..., Any]]  # the reader's -> a function from a case to what came of it
    package: Any  # that goes on in the place of one that is not right yet
    draw: Callable[[Any], None] = lambda yours: None  # shows one that is right at work


# file -> (module with BUILDS, what is built in it, by name)
FILES = {
    "my_kernel.py": ("kernel_building", ("my_scores", "my_dense_attention", "my_paged_attention")),
    "my_scheduler.py": ("scheduler_building", ("my_schedule",)),
    "my_cache.py": ("cache_building", ("MyCache",)),
}


def build_named(name: str) -> Build:
    """The thing to build of this name. Raises KeyError."""
    module = next(module for module, names in FILES.values() if name in names)
    builds: dict[str, Build] = importlib.import_module(f".{module}", __package__).BUILDS
    return builds[name]


def solution_in(file: str, place: str) -> str:
    """Where the solution is, and that it is no place to look around in before the other steps are done."""
    steps = len(FILES[file][1]) if file in FILES else 1
    return f"{place}, which has all {steps} steps" if steps > 1 else place


def build(name: str) -> Any:
    """Grade what the reader has built under this name in their file. Returns it if it is right, else the package's.

    For a reader, the file is made in the current folder from the lesson's template if it is not there.
    """
    session, task = current(), build_named(name)
    file = next(file for file, (_, names) in FILES.items() if name in names)
    template, path = session.directory / "templates" / file, session.workplace / file
    if session.solutions:
        path = session.directory / "solutions" / file
    elif not path.exists() and session.makes_files:
        _make_file(session, template, path)
    session.files.append(path)
    verdict, stage = grade_build(task, path if path.exists() else template)
    session.exercises[name] = Exercise(name, task.spec, (), stage.hint, verdict, path)
    session.checked.append(name)
    done = task.stages.index(stage)
    if done and verdict.state != "right":
        session.say(f"✓ {name}: {', '.join(each.title for each in task.stages[:done])}", "green")
    if verdict.state == "pending":
        where = f"{verdict.hole}, in {relative_path(path)}"
        session.say(f"○ {name} is yours to write ({stage.title}): {where}.", "cyan")
    elif verdict.state == "wrong":
        say_wrong(session, name, verdict, stage.hint, str(path))
    else:
        _say_right(session, task, path)
        return load(path)[name]
    return task.package


def _make_file(session: LessonSession, template: Path, path: Path) -> None:
    try:
        shutil.copyfile(template, path)
    except OSError as error:
        session.say(f"{path} cannot be made: {error.strerror}. Run the lesson in a folder of your own.", "yellow")
    else:
        session.say(f"{relative_path(path)} is made: write there. It says what is to be done.", "cyan")


def _say_right(session: LessonSession, task: Build, path: Path) -> None:
    whose = "the solution" if session.solutions else "yours"
    stages = ", ".join(stage.title for stage in task.stages)
    session.say(f"✓ {task.name} is right: {stages}. The lesson goes on with {whose}.", "bold green")
    solution = session.directory / "solutions" / path.name
    if solution.is_file() and solution != path:
        session.say(f"One way to write it: {solution_in(path.name, relative_path(solution))}", indent=4)
    task.draw(load(path)[task.name])
    if not session.solutions:
        record = session.progress.of(session.lesson)
        record.exercises[task.name] = True
        session.progress.save(session.lesson, record)


def grade_build(task: Build, path: Path) -> tuple[Verdict, Stage]:
    """The verdict over what `path` defines, and the first stage that is not right (or the last one)."""
    try:
        found = load(path).get(task.name)
    except Pending as hole:
        return Verdict("pending", hole=str(hole)), task.stages[0]
    except (Exception, SystemExit) as error:
        return Verdict("wrong", case=f"reading {path.name}", error=error), task.stages[0]
    if found is None:
        words = f"{path.name} defines no {task.name}"
        return Verdict("wrong", case=f"reading {path.name}", yours=words, spec=task.name), task.stages[0]
    trial = task.trial(found)
    trial.__name__ = task.name
    for stage in task.stages:
        verdict = grade(trial, task.spec, stage.cases)
        if verdict.state != "right":
            break
    return verdict, stage


def load(path: Path) -> dict[str, Any]:
    """What the file defines, read anew. Raises whatever the file raises."""
    linecache.checkcache()
    return runpy.run_path(str(path), run_name=path.stem)
