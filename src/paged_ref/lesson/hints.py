"""Hints in stages: the idea, more of it, a case worked out, and then a solution."""

from __future__ import annotations

from .building import solution_in
from .calls import show
from .grading import worked_case
from .lesson_session import Exercise, LessonSession, python_code, relative_path


def give_hint(session: LessonSession, exercise: Exercise) -> None:
    """Say the next hint for this exercise; after the last one, show a solution."""
    which = f"{exercise.name}: {exercise.hint}"  # each stage of something to build has its own
    given = session.hints_given.get(which, 0)
    session.hints_given[which] = given + 1
    hints = exercise.hint.split("\n")
    if example := worked_case(exercise.name, exercise.spec, exercise.cases):
        hints.append(f"for example, {example}")
    if given >= len(hints):
        _show_solution(session, exercise)
        return
    following = "a solution" if given + 1 == len(hints) else "more"
    session.say(f"hint for {exercise.name}: {hints[given]}")
    session.say(f"(h again: {following})", "dim")


def _show_solution(session: LessonSession, exercise: Exercise) -> None:
    path = session.directory / "solutions" / exercise.file.name
    if solution := session.solution(exercise.name):
        session.say(f"One way to write {exercise.name}:")
        show(python_code(solution[1]))
    elif path.is_file():
        session.say(f"One way to write {exercise.name}: {solution_in(path.name, relative_path(path))}")
    else:
        session.say(f"There is no further hint for {exercise.name}.")
