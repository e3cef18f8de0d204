"""The functions that a lesson calls. Each prints and asks through the current session."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..views.common.own_code import error_in_words
from .grading import Pending, Verdict, first_difference, grade
from .lesson_session import ClaimError, Exercise, LessonSession, current, python_code, relative_path
from .number_text import number_text, parse_number

Catcher = Literal["sanitizer", "integrity", "tracer", "contract", "engine"]
NEAR = 0.1  # of the truth: the right idea, counted a little otherwise (130 KiB for 128)
_CATCHER_OF_ERROR = {"SanitizerError": "sanitizer", "AssertionError": "integrity", "KernelError": "tracer"}
_CATCHER_IN_WORDS = {
    "sanitizer": "the sanitizer", "integrity": "the integrity check", "tracer": "the tracer",
    "contract": "the contract (the result must not change)", "engine": "the engine itself", "nothing": "nothing",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Guess:
    """What the reader expects, before the run."""

    question: str
    unit: str
    value: float | None  # None: no answer

    def grade(self, truth: float, within: float = 0.0, why: str = "") -> None:
        """Compare the guess with what the run gave, and say `why` the answer is what it is, whatever was typed.

        `within` is the share of the truth that still counts as right. Up to a tenth beside it is near.
        """
        unit = self.unit.removesuffix("s") if truth == 1 else self.unit
        say, it_is = current().say, f"{number_text(truth)} {unit}".rstrip()
        if self.value is None:
            say(f"• {self.question}\n  It is {it_is}.")
        elif self.value == truth:
            say(f"✓ Right: it is {it_is}.", "green")
        elif abs(self.value - truth) <= abs(truth) * within:
            say(f"✓ Close enough: you said {number_text(self.value)}, it is {it_is}.", "green")
        else:
            near = abs(self.value - truth) <= abs(truth) * NEAR
            word = "≈ Near" if near else "✗ Not so"
            say(f"{word}: you said {number_text(self.value)}, it is {it_is}.", "yellow")
        if why:
            say(f"{why}.", indent=4)


def predict(question: str, unit: str = "", among: Sequence[float] = ()) -> Guess:
    """Ask for a number before the run shows it; `guess.grade(measured)` comes after. Without a reader: no answer.

    The reader may type 2*3*8, 1,000, 50% or 2.5e6, with the unit or without it; where `among` is given, one of these.
    Enter alone keeps an earlier answer, or gives none.
    """
    session = current()
    record = session.progress.of(session.lesson)
    earlier = record.predictions.get(question)
    if not session.interactive:
        return Guess(question, unit, earlier)
    session.say(f"Predict: {question}", "bold")
    while True:
        hint = f"Enter keeps {number_text(earlier)}" if earlier is not None else "Enter: no answer"
        of = ", in percent" if unit == "percent" else f" of {unit}" if unit else ""
        typed = session.ask(f"  a number{of} ({hint}): ")
        if not typed:
            return Guess(question, unit, earlier)
        try:
            value = parse_number(_without_unit(typed, unit))
            if unit == "percent" and not 0 <= value <= 100:
                raise ValueError(f"{number_text(value)} percent; a share is 0 to 100 percent")
            if among and value not in among:
                raise ValueError(f"{number_text(value)} is none of {', '.join(map(number_text, among))}")
        except ValueError as error:
            session.say(f"{error}", "yellow")
        else:
            record.predictions[question] = value
            session.progress.save(session.lesson, record)
            return Guess(question, unit, value)


def _without_unit(typed: str, unit: str) -> str:
    """What was typed, without the unit behind the number: 800 KiB, 1 block and 30 % where these are asked for."""
    for word in (unit, unit.removesuffix("s"), "%" if unit == "percent" else ""):
        if word and typed.casefold().endswith(word.casefold()):
            return typed[: -len(word)].rstrip()
    return typed


def claim(text: str, found: Any, expected: Any = True) -> None:
    """Print what the run shows, and require it: `found` is `expected`. Raises ClaimError otherwise."""
    if (difference := first_difference(found, expected, kinds=False)) is not None:
        problem = f"This claim does not hold: {text}\n  found {found!r}, expected {expected!r} {difference}"
        raise ClaimError(problem.rstrip())
    counted = "" if isinstance(expected, (bool, str)) else f": {number_text(expected)}"
    if isinstance(expected, (list, tuple, set, np.ndarray)) and len(expected) > 8:
        counted = f" (all {len(expected)})"
    if current().to_do:  # no praise for what the reader has not written
        current().say(f"• with the package's own: {text}{counted}")
    else:
        current().say(f"✓ {text}{counted}", "green")


def show(*pictures: RenderableType) -> None:
    """Print what Rich can draw, or text as it is."""
    for picture in pictures:
        drawn = Text(picture) if isinstance(picture, str) else picture
        current().console.print(Padding(drawn, (0, 0, 0, 2), expand=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table from the run. Columns of numbers are aligned at the right."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    texts = [[cell if isinstance(cell, str) else number_text(cell) for cell in row] for row in rows]
    for number, column in enumerate(columns):
        is_numbers = all(re.fullmatch(r"[-+\d.,%]*", text[number]) for text in texts)
        drawn.add_column(column, justify="right" if is_numbers else "left")
    for text in texts:
        drawn.add_row(*map(Text, text))
    current().say(title, "italic")
    show(drawn)


def todo(hole: str) -> Any:
    """Stands where the reader's code goes; `hole` is the size of that code, as in `todo("1 line")`."""
    raise Pending(hole)


def check(
    yours: Callable[..., Any], *, spec: Callable[..., Any], cases: Sequence[tuple[Any, ...]], hint: str
) -> Callable[..., Any]:
    """Grade the reader's function against the package's, on all `cases` (tuples of arguments, copied for each).

    Returns the function with which the lesson goes on: the reader's if it is right, else `spec`.
    """
    session = current()
    name = yours.__name__
    solution = session.solution(name)
    if session.solutions and solution:
        yours = solution[0]
    verdict = grade(yours, spec, cases)
    session.exercises[name] = Exercise(name, spec, cases, hint, verdict, Path(yours.__code__.co_filename))
    session.checked.append(name)
    if verdict.printed:
        session.say(f"{name} printed:\n{verdict.printed[:800].rstrip()}", "dim")
    if verdict.state == "pending":
        at = f"{relative_path(yours.__code__.co_filename)}, line {yours.__code__.co_firstlineno}"
        open_hole = f"○ {name} is yours to write: {verdict.hole}, in {at}. Until then the package's own is used."
        session.say(open_hole, "cyan")
        return spec
    if verdict.state == "wrong":
        say_wrong(session, name, verdict, hint, yours.__code__.co_filename)
        return spec
    whose = "the solution" if session.solutions else "yours"
    session.say(f"✓ {name} is right in all {len(cases)} cases. The lesson goes on with {whose}.", "bold green")
    if not session.solutions:
        record = session.progress.of(session.lesson)
        record.exercises[name] = True
        session.progress.save(session.lesson, record)
    if solution:
        session.say("One way to write it:", indent=4)
        show(python_code(solution[1]))
    return yours


def say_wrong(session: LessonSession, name: str, verdict: Verdict, hint: str, file: str) -> None:
    """Show what is wrong with what the reader wrote in `file`."""
    session.say(f"✗ {name} is not right yet.", "bold red")
    for text in wrong_lines(verdict, file):
        session.say(text, indent=4)
    if not session.interactive:  # else h asks for it
        session.say("hint: {}".format(hint.partition("\n")[0]), indent=4)


def wrong_lines(verdict: Verdict, file: str) -> Iterator[str]:
    """What is wrong: the error and its place in the file, the call, yours, the spec, the first difference."""
    if verdict.error is not None:
        yield error_in_words(verdict.error, file)
    fills = verdict.yours == verdict.spec == "None"  # it is to change its arguments, and returns nothing
    for label, value in (("call", verdict.case), ("yours", verdict.yours), ("spec", verdict.spec)):
        if value and not (fills and label != "call"):
            yield f"{label:<6} {value}".replace("\n", "\n       ")
    if verdict.yours == "None" and not fills:
        yield "It returned None: is there a `return`?"
    if verdict.difference:
        yield f"first difference: {verdict.difference}"


def plug_in(where: tuple[Any, str], function: Any) -> AbstractContextManager[Any]:
    """Put `function` in the place of the package's own for a while. `where` is (class or module, name)."""
    return patch.object(where[0], where[1], new=function)


def break_it(
    what: str, *, where: tuple[Any, str], bug: Callable[[Any], Any], run: Callable[[], Any], caught_by: Catcher,
    text: Callable[[Any], str] | None = None,
) -> None:  # fmt: skip
    """Plant a bug for one run, unless the reader declines, and show which check catches it.

    `where` is (class or module, name), and `bug` makes the broken function from the real one. `run` is called without
    the bug and then with it; it returns what must not change, tokens for instance; `text` puts it into words. Raises
    ClaimError unless `caught_by` catches the bug.
    """
    session = current()
    session.say(f"Break it: {what}.", "bold")
    if session.interactive and session.ask("  Enter plants this bug (n: leave it out): ").lower() in ("n", "no"):
        return
    right = run()
    by, words = "nothing", ""
    try:
        with plug_in(where, bug(where[0].__dict__[where[1]])):
            broken = run()
        difference = first_difference(broken, right)
        if difference is not None:
            by, words = "contract", f"the first difference: {difference or 'all of it'}"
            if text is not None:
                words = f"right:        {text(right)}\nwith the bug: {text(broken)}"
    except Exception as error:
        by, words = _CATCHER_OF_ERROR.get(type(error).__name__, "engine"), f"{type(error).__name__}: {error}"
    if by != caught_by:
        found, expected = _CATCHER_IN_WORDS[by], _CATCHER_IN_WORDS[caught_by]
        raise ClaimError(f"The planted bug is caught by {found}, not by {expected}: {what}. {words}")
    session.caught[what] = by
    session.say(f"✓ Caught by {_CATCHER_IN_WORDS[by]}:", "green")
    session.say(words, indent=4)
