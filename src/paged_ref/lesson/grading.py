"""An answer compared with the spec, case by case: right, pending, or wrong with the first difference.

The answer is a first try: it may raise, print or loop without end, or change its arguments.
"""

from __future__ import annotations

import copy
import io
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Literal, NoReturn

import numpy as np

from ..core.checks import plural
from ..core.device import to_host, xp

SECONDS = 5.0  # for one call
CHARACTERS = 20_000  # that an answer may print
MAX_SHOWN = 400  # characters of a value
MUTABLE = (list, dict, set, np.ndarray)


class Pending(Exception):  # noqa: N818  (no error: the hole is not filled yet)
    """Raised by todo(): the reader has not written this yet. The message is the size of the hole."""


class Trail(dict[str, Any]):
    """An answer that comes in steps: what was done -> what came of it. Two trails differ at their first such step."""


class _Stopped(BaseException):
    """Not an Exception, so that an answer's own `except Exception` does not catch it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of an answer."""

    state: Literal["pending", "right", "wrong"]
    hole: str = ""  # size of the hole, when pending
    case: str = ""  # the call that went wrong
    yours: str = ""
    spec: str = ""
    difference: str = ""  # the first one; "" where yours and spec are short enough to compare by eye
    error: BaseException | None = None  # raised by the answer and not by the spec
    printed: str = ""  # by the answer


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of a call: a value or an error, and the arguments as the call left them."""

    value: Any
    error: BaseException | None
    arguments: tuple[Any, ...]


def grade(yours: Callable[..., Any], spec: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> Verdict:
    """Compare `yours(*case)` with `spec(*case)`, on copies of each case. The first difference decides.

    Compared are the values (floats and float arrays to 1e-5), the types of exceptions, and the arguments that are
    lists, dicts, sets or arrays, as the calls left them.
    """
    printed = _Limited()
    with redirect_stdout(printed):
        verdict = _grade(yours, spec, cases)
    return replace(verdict, printed=printed.getvalue())


def _grade(yours: Callable[..., Any], spec: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> Verdict:
    for case in cases:
        wanted = _call(spec, case)
        call = f"{yours.__name__}({', '.join(map(_text, case))})"
        try:
            with _time_limit():
                found = _call(yours, case)
        except Pending as hole:
            return Verdict("pending", hole=str(hole))
        except _Stopped as stopped:
            return Verdict("wrong", case=call, yours=str(stopped), spec=_outcome_text(wanted))
        if isinstance(wanted.value, Trail):
            if found.error is not None:
                return Verdict("wrong", case=call, error=found.error)
            if (step := _first_step(found.value, wanted.value)) is not None:
                return Verdict("wrong", "", f"{call}: {step[0]}", *step[1:])
            continue
        if (difference := _outcomes_differ(found, wanted)) is not None:
            error = found.error if wanted.error is None else None
            return Verdict("wrong", "", call, _outcome_text(found), _outcome_text(wanted), difference, error)
    return Verdict("right")


def _call(function: Callable[..., Any], case: tuple[Any, ...]) -> _Outcome:
    arguments = copy.deepcopy(case)
    try:
        return _Outcome(function(*arguments), None, arguments)
    except Pending:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error.__cause__, Pending):  # a hole in a kernel, which the tracer has reached
            raise error.__cause__ from None
        return _Outcome(None, error, arguments)


def _first_step(found: Trail, wanted: Trail) -> tuple[str, str, str, str] | None:
    """The first step in which the two differ: the step, what was found, what was wanted, the difference."""
    for step, right in wanted.items():
        if step not in found:
            return step, "does not come to this", _step_text(right), ""
        if (difference := first_difference(found[step], right)) is not None:
            return step, _step_text(found[step]), _step_text(right), difference
    return None


def _step_text(value: Any) -> str:
    return value if isinstance(value, str) else _text(value)


def _outcomes_differ(found: _Outcome, wanted: _Outcome) -> str | None:
    """Where the two differ first, in words; None for equal outcomes."""
    if wanted.error is not None or found.error is not None:
        return None if type(found.error) is type(wanted.error) else ""
    if (difference := first_difference(found.value, wanted.value)) is not None:
        return difference
    for number, (left, right) in enumerate(zip(found.arguments, wanted.arguments, strict=True), start=1):
        if isinstance(right, MUTABLE) and first_difference(left, right) is not None:
            return f"argument {number} is left as {_text(left)}; the spec leaves {_text(right)}"
    return None


def first_difference(found: Any, wanted: Any, at: str = "", kinds: bool = True) -> str | None:
    """Where two values differ first, in words; "" for plain values that differ, None for equal values.

    With `kinds`, a value of another kind differs, whatever it is worth: 8.0 is no slot, and a list no array.
    """
    found, wanted = (to_host(value) if isinstance(value, xp.ndarray) else value for value in (found, wanted))
    kind = _kind(wanted)
    if kinds and _kind(found) != kind and (kind, _kind(found)) not in _SERVES:
        return f"{f'at {at}: ' if at else ''}{_kind_text(wanted)} is expected, not {_kind_text(found)}"
    if isinstance(wanted, np.ndarray) or isinstance(found, np.ndarray):
        return _array_difference(np.asarray(found), np.asarray(wanted), kinds)
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        return _list_difference(found, wanted, at, kinds)
    if isinstance(wanted, (float, np.floating)) and isinstance(found, (int, float, np.number)):
        same = math.isclose(found, wanted, rel_tol=1e-5, abs_tol=1e-9) or found == wanted
    else:
        same = found == wanted
    return None if same else ""


_KINDS: list[tuple[Any, str]] = [  # the first that fits
    ((bool, np.bool_), "a bool"), ((int, np.integer), "an int"), ((float, np.floating), "a float"), (str, "a str"),
    (np.ndarray, "an array"), ((list, tuple), "a list"), (dict, "a dict"), (type(None), "None"),
]  # fmt: skip
_SERVES = {("a float", "an int")}  # (expected, also right)


def _kind(value: Any) -> str:
    """What a value is, in words."""
    names = (name for kinds, name in _KINDS if isinstance(value, kinds))
    return next(names, f"a {type(value).__name__}")


def _kind_text(value: Any) -> str:
    """The same for the reader: a tuple serves as a list, and is called what it is."""
    return "a tuple" if isinstance(value, tuple) else _kind(value)


def _array_difference(found: np.ndarray, wanted: np.ndarray, kinds: bool) -> str | None:
    if found.shape != wanted.shape:
        return f"shape {found.shape}; the spec has {wanted.shape}"
    is_float = wanted.dtype.kind == "f"
    if kinds and wanted.dtype.kind in "iu" and found.dtype.kind not in "iu":
        return f"an array of {wanted.dtype} is expected, not of {found.dtype}"
    same = np.isclose(found, wanted, 1e-5, 1e-6, equal_nan=True) if is_float else np.asarray(found == wanted)
    wrong = np.argwhere(~same)
    if not len(wrong):
        return None
    place = tuple(int(i) for i in wrong[0])
    one, other = _text(found[place]), _text(wanted[place])
    return f"at {[*place]}: {one} instead of {other}; {len(wrong)} of {wanted.size} differ"


def _list_difference(found: Sequence[Any], wanted: Sequence[Any], at: str, kinds: bool) -> str | None:
    """`at` is the place of these two lists in the lists around them, as in [3][0]."""
    for i, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if (difference := first_difference(one, other, f"{at}[{i}]", kinds)) is not None:
            return difference or f"at {at}[{i}]: {_text(one)} instead of {_text(other)}"
    return None if len(found) == len(wanted) else f"{plural(len(found), 'entry')}; the spec has {len(wanted)}"


def worked_case(name: str, spec: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> str:
    """The shortest call of the cases, and what is right for it; "" without cases."""
    calls = [(f"{name}({', '.join(map(_text, case))})", case) for case in cases]
    if not calls:
        return ""
    call, case = min(calls, key=lambda each: len(each[0]))
    outcome = _call(spec, case)
    if outcome.error is not None:
        return f"{call} {_outcome_text(outcome)}"
    if outcome.value is not None:
        return f"{call} gives {_outcome_text(outcome)}"
    left = [_text(after) for before, after in zip(case, outcome.arguments, strict=True) if isinstance(before, MUTABLE)]
    return f"{call} leaves {', '.join(left)}"


def _outcome_text(outcome: _Outcome) -> str:
    if isinstance(outcome.value, Trail):
        return ""
    if outcome.error is not None:
        return f"raises {type(outcome.error).__name__}: {outcome.error}".removesuffix(": ")
    return _text(outcome.value)


def _text(value: Any) -> str:
    """A value as Python writes it, shortened."""
    if isinstance(value, np.ndarray):
        if value.size <= 24:
            return np.array2string(value, precision=4, separator=", ")
        first = ", ".join(map(_text, value.ravel()[:4]))
        return f"[{first}, ...] of shape {value.shape}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes) and len(value) > 8:  # a digest: its beginning tells it from others
        return f"{value.hex()[:6]}.."
    if isinstance(value, list) and any(isinstance(each, bytes) for each in value):
        return f"[{', '.join(map(_text, value))}]"
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 4] + " ..."


class _Limited(io.StringIO):
    """Standard output of an answer, up to a limit."""

    def write(self, text: str) -> int:
        if self.tell() + len(text) > CHARACTERS:
            raise _Stopped(f"printed more than {CHARACTERS} characters, and was stopped: does a loop never end?")
        return super().write(text)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Stop an endless loop, where the system has such a clock and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(f"was still running after {SECONDS:g} seconds, and was stopped: does a loop never end?")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
