"""An answer compared with the spec: right, open, wrong in every way that a first try can be."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref import lesson
from paged_ref.lesson import grading
from paged_ref.lesson.calls import wrong_lines
from paged_ref.lesson.grading import grade
from paged_ref.views.common.own_code import error_in_words


def double(values: list[int]) -> list[int]:
    return [2 * value for value in values]


CASES: list[tuple[Any, ...]] = [([1, 2, 3],), ([],)]


def state(answer: Callable[..., Any], spec: Callable[..., Any] = double, cases: Any = CASES) -> str:
    return grade(answer, spec, cases).state


def test_a_right_answer_and_an_open_one() -> None:
    assert state(lambda values: [value + value for value in values]) == "right"
    verdict = grade(lambda values: lesson.todo("2 lines"), double, CASES)
    assert (verdict.state, verdict.hole) == ("pending", "2 lines")


def test_a_wrong_answer_shows_the_call_both_values_and_the_first_difference() -> None:
    def wrong(values: list[int]) -> list[int]:
        return [values[0] * 2, *values[1:]] if values else []

    verdict = grade(wrong, double, CASES)
    assert (verdict.state, verdict.case) == ("wrong", "wrong([1, 2, 3])")
    assert (verdict.yours, verdict.spec) == ("[2, 2, 3]", "[2, 4, 6]")
    assert verdict.difference == "at [1]: 2 instead of 4"


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ((8, 70, 8), None, "None is expected, not a tuple"),
        (None, (8, 70, 8), "a tuple is expected, not None"),
        ([1], [], "1 entry; the spec has 0"),
        ([b"\x01\xab" * 8], [b"\x02\xcd" * 8], "at [0]: 01ab01.. instead of 02cd02.."),
    ],
)
def test_a_difference_names_what_is_there(found: Any, wanted: Any, difference: str) -> None:
    assert grading.first_difference(found, wanted) == difference


def test_an_answer_that_raises_prints_loops_or_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "SECONDS", 0.2)

    def raises(values: list[int]) -> list[int]:
        return [values[99]]

    def floods(values: list[int]) -> None:
        while True:
            with suppress(Exception):
                print("again and again")

    def loops(values: list[int]) -> None:
        while True:
            pass

    verdict = grade(raises, double, CASES)
    assert verdict.state == "wrong"
    assert isinstance(verdict.error, IndexError)
    verdict = grade(floods, double, CASES)
    assert "printed more than" in verdict.yours
    assert verdict.printed.startswith("again and again")
    assert "still running" in grade(loops, double, CASES).yours
    assert state(lambda values: sys.exit(3)) == "wrong"
    assert grade(lambda values: None, double, CASES).yours == "None"


def test_what_is_left_in_the_arguments_counts() -> None:
    def pop(values: list[int]) -> int:
        return values.pop()

    assert state(lambda values: values[-1], pop, [([1, 2],)]) == "wrong"
    assert "argument 1 is left as [1, 2]" in grade(lambda values: values[-1], pop, [([1, 2],)]).difference
    assert state(lambda values: values.pop(), pop, [([1, 2],)]) == "right"
    assert state(lambda values: values.pop(0), pop, [([],)]) == "right", "the same error"
    assert state(lambda values: 5, pop, [([],)]) == "wrong", "no error"


def test_floats_arrays_and_shapes() -> None:
    def spec(x: Any) -> Any:
        return x / 3

    array = np.arange(6.0).reshape(2, 3)
    assert state(lambda x: x * (1 / 3), spec, [(array,), (2.0,)]) == "right"
    verdict = grade(lambda x: x / 3 + (x == 4), spec, [(array,)])
    assert verdict.difference.startswith("at [1, 1]: 2.33")
    assert "shape (6,)" in grade(lambda x: x.ravel() / 3, spec, [(array,)]).difference
    assert state(lambda x: np.where(x > 4, np.nan, x / 3), spec, [(array,)]) == "wrong"


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        (8.0, 8, "an int is expected, not a float"),
        ("8", 8, "an int is expected, not a str"),
        (None, 8, "an int is expected, not None"),
        (True, 1, "an int is expected, not a bool"),
        ([1.5], np.array([1.5]), "an array is expected, not a list"),
        (np.array([8.0]), np.array([8]), "an array of int64 is expected, not of float64"),
        ([[3, 8.0]], [(3, 8)], "at [0][1]: an int is expected, not a float"),
        (np.int64(8), 8, None),
        (8, 8.0, None),
        ([3], (3,), None),
    ],
)
def test_a_wrong_type_never_passes(answer: Any, right: Any, expected: str | None) -> None:
    verdict = grade(lambda: answer, lambda: right, [()])
    assert (verdict.difference or None) == expected
    assert verdict.state == ("right" if expected is None else "wrong")


def test_of_an_answer_in_steps_the_first_that_differs_is_named() -> None:
    wanted = grading.Trail({"first": "a", "second": [1, 2], "third": 5})
    found = grading.Trail({"first": "a", "second": [1, 3], "third": 6})
    verdict = grade(lambda: found, lambda: wanted, [()])
    assert verdict.case.endswith("(): second")
    assert (verdict.yours, verdict.spec, verdict.difference) == ("[1, 3]", "[1, 2]", "at [1]: 3 instead of 2")
    del found["second"]
    assert grade(lambda: found, lambda: wanted, [()]).yours == "does not come to this"


def test_the_worked_case_of_a_hint() -> None:
    def release(free: list[int], block: int) -> None:
        free.append(block)

    assert grading.worked_case("my_double", double, CASES) == "my_double([]) gives []"
    assert grading.worked_case("my_release", release, [([1], 2)]) == "my_release([1], 2) leaves [1, 2]"
    assert grading.worked_case("my_f", lambda x: {}[x], [(0,)]) == "my_f(0) raises KeyError: 0"
    assert grading.worked_case("MyCache", double, ()) == ""


def test_an_answer_that_fills_its_arguments_is_not_asked_for_a_return() -> None:
    def release(free: list[int]) -> None:
        free.append(2)

    def lines(answer: Callable[..., Any], spec: Callable[..., Any]) -> list[str]:
        return list(wrong_lines(grade(answer, spec, [([1],)]), ""))

    wrong = lines(lambda free: free.append(3), release)
    assert wrong == ["call   <lambda>([1])", "first difference: argument 1 is left as [1, 3]; the spec leaves [1, 2]"]
    assert "It returned None: is there a `return`?" in lines(lambda free: None, double)


def test_an_error_is_told_in_words_with_the_line_of_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "my_answer.py"
    file.write_text("def free(lengths, seq):\n    del lengths[seq]\n    return max(lengths)\n")
    free = runpy.run_path(str(file))["free"]
    for lengths, words in (
        ({}, "line 2 of my_answer.py, `del lengths[seq]`: KeyError: there is no key 3"),
        ({3: 1}, "line 3 of my_answer.py, `return max(lengths)`: ValueError: max() "),
        (
            None,
            "line 2 of my_answer.py, `del lengths[seq]`: TypeError: 'NoneType' ",
        ),
    ):
        error = grade(free, lambda lengths, seq: None, [(lengths, 3)]).error
        assert error is not None
        assert error_in_words(error, str(file)).startswith(words)
    assert error_in_words(KeyError(), "") == "KeyError"
