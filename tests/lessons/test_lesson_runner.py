"""The lesson runner: grading first tries of every kind, numbers as people type them, progress, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref import lesson
from paged_ref.cli import main
from paged_ref.lesson import grading, lesson_script
from paged_ref.lesson.grading import grade
from paged_ref.lesson.lesson_session import ClaimError, LessonSession, running
from paged_ref.lesson.number_text import parse_number
from paged_ref.lesson.progress import Progress

# --- grading -------------------------------------------------------------------------------------------


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
    ("typed", "value"),
    [("27", 27), (" 1,000 ", 1000), ("2*3*8", 48), ("2.5e6", 2.5e6), ("-(4+1)/2", -2.5), ("50%", 0.5), ("7//2", 3)],
)
def test_numbers_as_people_type_them(typed: str, value: float) -> None:
    assert parse_number(typed) == value


@pytest.mark.parametrize(
    "typed", ["", "many", "2**9999", "1/0", "__import__('os')", "[1]", "True", "(" * 300, "1e999*0j"]
)
def test_what_is_no_number(typed: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(typed)


# --- claims and planted bugs ---------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path: Path) -> LessonSession:
    return LessonSession("01_small", tmp_path, Progress(tmp_path / "lessons.json"), False)


class Books:
    def total(self) -> int:
        return 3


def test_a_claim_that_does_not_hold_ends_the_lesson(session: LessonSession, capsys: pytest.CaptureFixture[str]) -> None:
    with running(session):
        lesson.claim("twelve slots", 12, 12)
        assert "✓ twelve slots: 12" in capsys.readouterr().out
        for found, expected in ((13, 12), (False, True), ([1], [2])):
            with pytest.raises(ClaimError, match="does not hold: twelve"):
                lesson.claim("twelve slots", found, expected)


def test_a_planted_bug_must_be_caught_by_whom_the_lesson_says(session: LessonSession) -> None:
    def plant(bug: Callable[[Any], Any], caught_by: Any) -> None:
        where = (Books, "total")
        lesson.break_it("one is lost", where=where, bug=bug, run=lambda: Books().total(), caught_by=caught_by)

    def fails(self: Books) -> int:
        raise AssertionError("the books do not balance")

    with running(session):
        plant(lambda real: lambda self: real(self) - 1, "contract")
        plant(lambda real: fails, "integrity")
        with pytest.raises(ClaimError, match="caught by nothing"):
            plant(lambda real: real, "contract")
        with pytest.raises(ClaimError, match="caught by the integrity check, not by the sanitizer"):
            plant(lambda real: fails, "sanitizer")
    assert Books().total() == 3, "the bug is taken out again"


# --- progress ------------------------------------------------------------------------------------------


def test_progress_is_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lessons.json"
    progress = Progress(path)
    assert (progress.part("05"), progress.solved("05"), progress.was_begun("05")) == (1, [], False)
    progress.set_part("05", 3)
    progress.set_solved("05", "my_slot_of")
    progress.set_prediction("05", "How many?", 4)
    again = Progress(path)
    assert (again.part("05"), again.solved("05"), again.prediction("05", "How many?")) == (3, ["my_slot_of"], 4)
    assert [p.name for p in path.parent.iterdir()] == ["lessons.json"]


def test_a_file_that_is_not_progress_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "lessons.json"
    for text in ("{", "[1]", '{"05": 3}', "\x00"):
        path.write_text(text)
        progress = Progress(path)
        assert "is not what was written there" in progress.warnings[0]
        assert (tmp_path / "lessons.unreadable").read_text() == text
        progress.set_part("05", 2)
        assert Progress(path).part("05") == 2


def test_entries_of_a_strange_kind_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "lessons.json"
    path.write_text(json.dumps({"05": {"part": "x", "exercises": 3, "predictions": {"How many?": "four"}}}))
    progress = Progress(path)
    assert (progress.part("05"), progress.solved("05"), progress.prediction("05", "How many?")) == (1, [], None)


def test_progress_that_cannot_be_kept_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    progress = Progress(tmp_path / "file" / "lessons.json")
    progress.set_part("05", 2)
    progress.set_part("05", 3)
    assert len(progress.warnings) == 1
    assert progress.part("05") == 3


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    head = '"""Lesson {}: number {}\n\nQuestion: which?\nTime: 15 minutes. Short.\n"""\n\n# ## Run\n#\n# Text.\n\n{}\n'
    (tmp_path / "01_one.py").write_text(head.format(1, "one", "print('ran', 40 + 2)"))
    (tmp_path / "02_two.py").write_text(head.format(2, "two", "print(1 / 0)"))
    return tmp_path


def test_a_lesson_in_a_pipe_shows_and_runs_all_and_waits_for_nobody(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lesson", "1", "--lessons", str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line for line in ("Question: which?", "Text.", "print('ran', 40 + 2)", "ran 42") if line not in out] == []


def test_an_error_of_the_lesson_is_shown_without_the_runners_frames(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lesson", "2", "--lessons", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError: division by zero" in out
    assert "lesson_player.py" not in out
    (folder / "02_two.py").write_text((folder / "02_two.py").read_text() + "print(\n")
    assert main(["lesson", "2", "--lessons", str(folder)]) == 1
    assert "SyntaxError" in capsys.readouterr().out


def test_the_list_shows_what_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lesson", "--lessons", str(folder)]) == 0
    assert "Go on with: paged-ref lesson 1" in capsys.readouterr().out
    main(["lesson", "1", "--lessons", str(folder)])
    assert not Progress().was_begun("01_one"), "a pipe has no reader"
    Progress().set_part("01_one", 0)
    Progress().set_solved("01_one", "my_f")
    (folder / "02_two.py").write_text("def\n")
    capsys.readouterr()
    assert main(["lesson", "--lessons", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "to the end" in out
    assert "✓ solved" in out
    assert "not readable" in out
    assert "Go on with: paged-ref lesson 2" in out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["9"], "lesson is 9; known are 1 to 2"),
        (["1", "--part", "4"], "--part is 4; lesson 1 has the parts 1 to 1"),
        (["--watch"], "--watch needs the number of a lesson"),
        (["1", "--part", "1", "--watch"], "--watch runs the whole lesson"),
        (["--part", "1"], "--part needs the number of a lesson"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert main(["lesson", *argv, "--lessons", str(folder)]) == 2
    assert sentence in capsys.readouterr().err


def test_without_lessons_it_says_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_ref.lesson import command

    assert main(["lesson", "--lessons", str(tmp_path)]) == 2
    assert "no file NN_name.py is in it" in capsys.readouterr().err
    monkeypatch.setattr(command, "_CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["lesson"]) == 2
    assert "in the folder lessons/ of the project's repository" in capsys.readouterr().err


def test_a_script_that_is_interrupted_or_claims_too_much_shows_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    for code, words in (("raise KeyboardInterrupt", "Interrupted"), ("claim('two', 1, 2)", "does not hold: two")):
        path = tmp_path / "01_x.py"
        path.write_text(f"from paged_ref.lesson import claim\nclaim('it is so', True)\n{code}\n")
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


# --- the file ------------------------------------------------------------------------------------------


def test_prose_is_a_paragraph_of_comments_and_all_else_is_code(tmp_path: Path) -> None:
    path = tmp_path / "01_x.py"
    path.write_text(
        '"""Lesson 1: x\n\nQuestion: a\nlong one?\nTime: 15 minutes.\n"""\n\nimport os\n\n'
        "# ## First\n#\n# Prose\n# here.\n\n# more\n\n# touches the code\nx = 1\n\n\ndef f():\n\n    # inside\n\n"
        "    return 2\n\n# ## Second\n\n# tail\n"
    )
    lesson = lesson_script.read(path)
    assert (lesson.number, lesson.title, lesson.question, lesson.minutes) == (1, "x", "a long one?", 15)
    assert [part.title for part in lesson.parts] == ["What it uses", "First", "Second"]
    first = [(passage.kind, passage.text) for passage in lesson.parts[1].passages]
    assert first == [
        ("prose", "Prose\nhere.\n\nmore"),
        ("code", "# touches the code\nx = 1\n\n\ndef f():\n\n    # inside\n\n    return 2"),
    ]
    namespace: dict[str, Any] = {}
    for part in lesson.parts:
        for passage in part.passages:
            if passage.kind == "code":
                lesson_script.execute(passage, path, namespace)
    assert namespace["f"]() == 2
    assert namespace["f"].__code__.co_firstlineno == 21


def test_long_code_is_cut_between_statements(tmp_path: Path) -> None:
    path = tmp_path / "01_x.py"
    statements = "\n\n".join(f"x{i} = (\n    {i}\n)" for i in range(12))
    path.write_text(f'"""Lesson 1: x\n\nQuestion: a?\nTime: 15 minutes.\n"""\n\n{statements}\n')
    passages = [passage for part in lesson_script.read(path).parts for passage in part.passages]
    assert len(passages) == 3
    assert sum(len(passage.statements) for passage in passages) == 12
    assert all(passage.text.count("\n") < 20 for passage in passages)
