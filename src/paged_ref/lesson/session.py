"""The functions that a lesson calls, and the session that they speak to: who asks, prints, grades and keeps."""

from __future__ import annotations

import ast
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .grading import Pending, Verdict, first_difference, grade
from .progress import Progress

Catcher = Literal["sanitizer", "integrity", "tracer", "contract", "engine"]
_CATCHERS: dict[str, Catcher] = {"SanitizerError": "sanitizer", "AssertionError": "integrity", "KernelError": "tracer"}
_IN_WORDS = {
    "sanitizer": "the sanitizer", "integrity": "the integrity check", "tracer": "the tracer",
    "contract": "the contract (the result must not change)", "engine": "the engine itself", "nobody": "nobody",
}  # fmt: skip


class ClaimError(Exception):
    """A lesson said what its run does not show."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One check() and what came of it."""

    name: str
    yours: Callable[..., Any]
    spec: Callable[..., Any]
    cases: Sequence[tuple[Any, ...]]
    hint: str
    verdict: Verdict

    def grade(self, answer: Callable[..., Any]) -> Verdict:
        return grade(answer, self.spec, self.cases)


@dataclass(slots=True)
class Session:
    """One run of one lesson."""

    lesson: str  # the name of its file, without .py
    directory: Path  # of its file
    progress: Progress
    interactive: bool  # someone is there to answer
    solutions: bool = False  # every hole is filled from lessons/solutions
    console: Console = field(default_factory=lambda: Console(highlight=False))
    exercises: dict[str, Exercise] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)  # exercises that the part under way came to
    caught: dict[str, str] = field(default_factory=dict)  # planted bug -> who caught it

    def say(self, text: str, style: str = "", indent: int = 2) -> None:
        self.console.print(Padding(Text(text, style), (0, 0, 0, indent)), width=min(self.console.width, 100))

    def ask(self, prompt: str) -> str | None:
        """A line typed by the reader; None at the end of input."""
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
        source = path.read_text(encoding="utf-8")
        namespace: dict[str, Any] = {"__name__": f"solutions of {self.lesson}", "__file__": str(path)}
        exec(compile(source, str(path), "exec", dont_inherit=True), namespace)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                return namespace[name], "\n".join(source.splitlines()[first - 1 : node.end_lineno])
        return None


# --- which session -------------------------------------------------------------------------------------

_current: Session | None = None


@contextmanager
def running(session: Session) -> Iterator[None]:
    """The lesson's functions speak to this session."""
    global _current
    before, _current = _current, session
    try:
        yield
    finally:
        _current = before


def _session() -> Session:
    """The one under way; for `python lessons/NN_name.py`, one for the script that called."""
    global _current
    if _current is None:
        path = Path(sys._getframe(2).f_globals.get("__file__", "lesson.py")).resolve()
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        _current = Session(path.stem, path.parent, Progress(), interactive)
        sys.excepthook = _friendly(sys.excepthook)
    return _current


def _friendly(hook: Any) -> Any:
    """Without a runner: no traceback where the reader only left, or a claim did not hold."""

    def shown(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nInterrupted. What you did so far is kept.", file=sys.stderr)
        elif issubclass(kind, ClaimError):
            print(f"\n{error}", file=sys.stderr)
        else:
            hook(kind, error, trace)

    return shown


# --- what a lesson calls -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guess:
    """What the reader expects, before the run."""

    question: str
    unit: str
    value: float | None  # None: not said

    def grade(self, truth: float, within: float = 0.0) -> None:
        """Hold it against what the run gave. `within` is the share of the truth that still counts as right."""
        unit = self.unit.removesuffix("s") if truth == 1 else self.unit
        say, it_is = _session().say, f"{_number(truth)} {unit}".rstrip()
        if self.value is None:
            say(f"• {self.question}\n  It is {it_is}.")
        elif self.value == truth:
            say(f"✓ Right: it is {it_is}.", "green")
        elif abs(self.value - truth) <= abs(truth) * within:
            say(f"✓ Close enough: you said {_number(self.value)}, it is {it_is}.", "green")
        else:
            say(f"✗ Not so: you said {_number(self.value)}, it is {it_is}. Why?", "yellow")


def predict(question: str, unit: str = "") -> Guess:
    """Ask for a number before the run shows it; `guess.grade(measured)` comes after. Without a reader: no answer.

    The reader may type 2*3*8, 1,000, 50% or 2.5e6, or only Enter to pass, which keeps an earlier answer.
    """
    session = _session()
    earlier = session.progress.prediction(session.lesson, question)
    if not session.interactive:
        return Guess(question, unit, earlier)
    session.say(f"Predict: {question}", "bold")
    while True:
        hint = f"Enter keeps {_number(earlier)}" if earlier is not None else "Enter passes"
        typed = session.ask(f"  a number{f' of {unit}' if unit else ''} ({hint}): ")
        if not typed:
            return Guess(question, unit, earlier)
        try:
            value = parse_number(typed.rstrip("% ") if unit == "percent" else typed)
        except ValueError as error:
            session.say(f"{error}", "yellow")
            continue
        session.progress.set_prediction(session.lesson, question, value)
        return Guess(question, unit, value)


def claim(text: str, found: Any, expected: Any = True) -> None:
    """Say what the run shows, and hold it to that: `found` is `expected`. Raises ClaimError where it is not."""
    difference = first_difference(found, expected)
    if difference is not None:
        raise ClaimError(
            f"This claim does not hold: {text}\n  found {found!r}, expected {expected!r} {difference}".rstrip()
        )
    if isinstance(expected, (bool, str)):
        counted = ""
    elif isinstance(expected, (list, tuple, set, np.ndarray)) and len(expected) > 8:
        counted = f" (all {len(expected)})"
    else:
        counted = f": {_number(expected)}"
    _session().say(f"✓ {text}{counted}", "green")


def show(*pictures: RenderableType) -> None:
    """Print what Rich can draw, or text as it is."""
    for picture in pictures:
        _session().console.print(Text(picture) if isinstance(picture, str) else picture)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table from the run. Columns of numbers are flushed right."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    texts = [[cell if isinstance(cell, str) else _number(cell) for cell in row] for row in rows]
    for number, column in enumerate(columns):
        is_numbers = all(re.fullmatch(r"[-+\d.,%]*", text[number]) for text in texts)
        drawn.add_column(column, justify="right" if is_numbers else "left")
    for text in texts:
        drawn.add_row(*map(Text, text))
    _session().say(title, "italic")
    _session().console.print(Padding(drawn, (0, 0, 0, 2)))


def todo(hole: str) -> Any:
    """Stands where the reader's code goes, and says how much of it: `todo("1 line")`."""
    raise Pending(hole)


def check(
    yours: Callable[..., Any], *, spec: Callable[..., Any], cases: Sequence[tuple[Any, ...]], hint: str
) -> Callable[..., Any]:
    """Grade the reader's function against the package's, on all `cases` (tuples of arguments, copied for each).

    Returns what the lesson goes on with: the reader's function where it is right, else `spec`.
    """
    session = _session()
    name = yours.__name__
    solution = session.solution(name)
    if session.solutions and solution:
        yours = solution[0]
    verdict = grade(yours, spec, cases)
    session.exercises[name] = Exercise(name, yours, spec, cases, hint, verdict)
    session.checked.append(name)
    say = session.say
    if verdict.printed:
        say(f"{name} printed:\n{verdict.printed[:800].rstrip()}", "dim")
    if verdict.state == "pending":
        at = f"{short(yours.__code__.co_filename)}, line {yours.__code__.co_firstlineno}"
        say(f"○ {name} is yours to write: {verdict.hole}, in {at}. Until then the package's own is used.", "cyan")
        return spec
    if verdict.state == "wrong":
        say(f"✗ {name} is not right yet.", "bold red")
        if verdict.error is not None:
            say(_where(verdict.error, yours), "red", 4)
        for label, value in (("call", verdict.case), ("yours", verdict.yours), ("spec", verdict.spec)):
            say(f"{label:<6} {value}".replace("\n", "\n       "), indent=4)
        if verdict.yours == "None":
            say("It returned None: is there a `return`?", indent=4)
        if verdict.difference:
            say(f"first difference: {verdict.difference}", indent=4)
        say(f"hint: {hint}", indent=4)
        return spec
    whose = "the solution" if session.solutions else "yours"
    say(f"✓ {name} is right in all {len(cases)} cases. The lesson goes on with {whose}.", "bold green")
    if not session.solutions:
        session.progress.set_solved(session.lesson, name)
    if solution:
        say("One way to write it:", indent=4)
        session.console.print(Padding(Syntax(solution[1], "python", theme="ansi_dark"), (0, 0, 0, 4)))
    return yours


@contextmanager
def plug_in(where: tuple[Any, str], function: Any) -> Iterator[None]:
    """Put `function` in the place of the package's own, `where` = (class or module, name), for a while."""
    owner, name = where
    real = owner.__dict__[name]
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, real)


def break_it(
    what: str,
    *,
    where: tuple[Any, str],
    bug: Callable[[Any], Any],
    run: Callable[[], Any],
    caught_by: Catcher,
) -> None:
    """Plant a bug for one run, at the press of a button, and show who catches it.

    `where` is (class or module, name), `bug` makes the broken function from the real one, and `run` is what
    runs whole and then broken; it returns what must not change, tokens for instance. Raises ClaimError where
    the bug is not caught, or by another than `caught_by`.
    """
    session = _session()
    session.say(f"Break it: {what}.", "bold")
    if session.interactive and session.ask("  b and Enter plants this bug (Enter leaves it): ") != "b":
        return
    whole = run()
    by, words = "nobody", ""
    try:
        with plug_in(where, bug(where[0].__dict__[where[1]])):
            difference = first_difference(run(), whole)
        if difference is not None:
            by, words = "contract", f"the first difference: {difference or 'all of it'}"
    except Exception as error:
        by, words = _CATCHERS.get(type(error).__name__, "engine"), f"{type(error).__name__}: {error}"
    if by != caught_by:
        raise ClaimError(
            f"The planted bug is caught by {_IN_WORDS[by]}, not by {_IN_WORDS[caught_by]}: {what}. {words}"
        )
    session.caught[what] = by
    session.say(f"✓ Caught by {_IN_WORDS[by]}:", "green")
    session.say(words, indent=4)


# --- numbers, as people type and read them -------------------------------------------------------------

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def parse_number(text: str) -> float:
    """A number, or a sum of products of numbers. Raises ValueError that says so."""
    plain = text.replace(",", "").replace("_", "").replace("×", "*").strip()
    share = plain.endswith("%")
    try:
        value = _value(ast.parse(plain.rstrip("% "), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        raise ValueError(f"{text[:40]!r} is not a number; 27, 2*3*8, 1,000 and 50% are") from None
    return value / 100 if share else value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError


def _number(value: Any) -> str:
    """As people read it: 131,072 and 0.25."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:,.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def short(path: str | Path) -> str:
    """The path as the reader would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _where(error: BaseException, function: Callable[..., Any]) -> str:
    """The line of the reader's file at which it was raised."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == function.__code__.co_filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{type(error).__name__} at line {line}: {error}"
