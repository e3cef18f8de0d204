"""A reader at a real (pseudo) terminal: right and wrong answers, Ctrl-C, a broken file. Nothing is lost."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.lesson_reader import Reader

LESSON = '''"""Lesson 1: a small one

Question: how much is twice a number?
Time: 15 minutes. Needs nothing.

It is short.
"""

from paged_ref.lesson import break_it, check, claim, predict, todo


class Books:
    def balance(self):
        return [1, 2]


# ## Predict
#
# Twice *seven*.

guess = predict("How much is twice seven?", "euros")

# ## Run

print("here it runs")
guess.grade(14)
claim("it is", 14, 14)

# ## What must hold

break_it("one is lost", where=(Books, "balance"), bug=lambda real: lambda self: [1],
         run=lambda: Books().balance(), caught_by="contract")

# ## Exercise


def my_twice(number):
    return todo("1 line")


check(my_twice, spec=lambda number: 2 * number, cases=[(3,), (5,)], hint="Multiply it.")

# ## Next
#
# That was all.
'''
PROGRAM = f"{sys.executable} -m paged_ref"  # the reader works in another folder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "01_small.py").write_text("def my_twice(number):\n    return number + number\n")
    (tmp_path / "01_small.py").write_text(LESSON)
    return tmp_path


def answer(directory: Path, code: str) -> None:
    (directory / "01_small.py").write_text(LESSON.replace('return todo("1 line")', code))


def progress(directory: Path) -> Any:
    path = directory / "state" / "paged_ref" / "lessons.json"
    return json.loads(path.read_text())["01_small"]


def test_a_reader_goes_through_a_lesson(directory: Path) -> None:
    reader = Reader(directory)
    reader.see(f"Go on with: {PROGRAM} lesson 1")
    reader.see("q: leave]")
    reader.type("")
    assert "how much is twice a number?" in reader.see("1 of 5: Predict")
    reader.see("a number of euros (Enter: no answer):")
    reader.type("plenty")
    reader.see("'plenty' is not a number")
    reader.type("3 * 5")
    reader.see("q: leave]")
    reader.type("")
    reader.see("here it runs")
    reader.see("you said 15, it is 14 euros")
    reader.see("✓ it is: 14")
    reader.see("q: leave]")
    reader.type("")
    reader.see("Enter plants this bug (n: leave it out)")
    reader.type("")
    reader.see("Caught by the contract")
    reader.see("q: leave]")
    reader.type("")
    reader.see("my_twice is yours to write: 1 line")
    for typed, sentence in (
        ("h", "hint for my_twice: Multiply it."),
        ("H", "for example, my_twice(3) gives 6"),
        ("h", "return number + number"),
        ("rr", "'rr' is none of the keys."),
    ):
        reader.see("h: hint  e: edit  b: back  q: leave]")
        reader.type(typed)
        reader.see(sentence)
    # The reader writes, and each time asks for the part again.
    for code, sentence in (
        ("return number + 2", "spec   6"),
        ("return number +", "SyntaxError"),
        ("return number / 0", "return number / 0`: ZeroDivisionError: division by"),
        ("print('looking')", "is there a `return`?"),
    ):
        answer(directory, code)
        reader.see("q: leave]")
        reader.type("r")
        reader.see(sentence)
    answer(directory, "return 2 * number")
    reader.see("q: leave]")
    reader.type("r")
    reader.see("my_twice is right in all 2 cases")
    reader.see("return number + number")
    reader.see("q: leave]")
    reader.type("")
    reader.see("That was all.")
    reader.see("q: leave]")
    reader.type("")
    reader.see("Solved. This was the last lesson.")
    assert reader.end() == 0
    running = reader.raw.split("running ...\x1b[0m")[1:]
    assert running
    assert all(after.startswith("\r\x1b[2K") for after in running), "the word does not disappear"
    assert progress(directory) == {
        "part": 0,
        "predictions": {"How much is twice seven?": 15.0},
        "exercises": {"my_twice": True},
    }


def test_leaving_and_interrupting_lose_nothing(directory: Path) -> None:
    reader = Reader(directory, "1")
    reader.see("a number of euros")
    reader.type("14")
    reader.see("q: leave]")
    reader.interrupt()
    reader.see(f"Interrupted. What you did is kept. {PROGRAM} lesson 1 goes on with part 1.")
    assert reader.end() == 130
    assert progress(directory)["part"] == 1

    reader = Reader(directory, "1")
    reader.see("Enter keeps 14")
    reader.type("")
    reader.see("q: leave]")
    reader.type("")
    reader.see("Right: it is 14 euros")
    reader.see("q: leave]")
    reader.type("q")
    reader.see("Left.")
    assert reader.end() == 0
    assert progress(directory)["part"] == 2


def test_a_reader_goes_back_edits_and_loses_no_progress(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """b shows the parts before, those that ran unseen, too; e opens the editor; a lesson that is done stays done."""
    monkeypatch.setenv("VISUAL", str(directory / "nano"))
    (directory / "nano").write_text('#!/bin/sh\necho "nano got $1"\nsed -i "s/return todo.*/return 2 * number/" "$2"\n')
    (directory / "nano").chmod(0o755)
    reader = Reader(directory, "1", "--part", "4")
    reader.see("my_twice is yours to write")
    for typed, title in (("b", "3 of 5"), ("b", "2 of 5"), ("", "3 of 5"), ("", "4 of 5")):
        reader.see("q: leave]")
        reader.type(typed)
        reader.see(title)
    line = LESSON[: LESSON.index("def my_twice")].count("\n") + 1
    reader.see("q: leave]")
    reader.type("e")
    reader.see(f"nano got +{line}")
    reader.see("my_twice is right in all 2 cases")
    reader.see("q: leave]")
    reader.type("")
    reader.see("q: leave]")
    reader.type("")
    assert reader.end() == 0
    assert progress(directory)["part"] == 0

    reader = Reader(directory, "1", "--part", "2")
    reader.see("q: leave]")
    os.write(reader.main, b"\x04")  # Ctrl-D
    reader.see("Left. Lesson 1 stays done.")
    assert reader.end() == 0
    assert progress(directory)["part"] == 0
    assert progress(directory)["exercises"] == {"my_twice": True}


def test_a_reader_runs_an_earlier_part_again(directory: Path) -> None:
    """After an Enter too many: b, then r, runs the exercise as it is now; and no key is taken for another."""
    more = 'claim("so far", 1, 1)\ncheck(lambda: todo("2 lines"), spec=int, cases=[()], hint="")\n\n'
    lesson = LESSON.replace("# ## Next", f"{more}# ## Next")
    (directory / "01_small.py").write_text(lesson)
    reader = Reader(directory, "1", "--part", "4")
    reader.see("[Enter: what it prints]")
    reader.type("")
    reader.see("with the package's own: so far")
    for typed, sentence in (
        ("", "5 of 5"), ("b", "4 of 5"), ("h", "'h' is none of the keys."), ("e", "'e' is none of the keys."),
    ):  # fmt: skip
        reader.see("q: leave]")
        reader.type(typed)
        reader.see(sentence)
    (directory / "01_small.py").write_text(lesson.replace('return todo("1 line")', "return 2 * number", 1))
    reader.see("r: run again from here  b: back  q: leave]")
    reader.type("r")
    reader.see("my_twice is right in all 2 cases")
    reader.see("✓ so far: 1")  # the second exercise, open in the run before, comes after it
    for title in ("5 of 5", "Still to write: <lambda>"):
        reader.see("q: leave]")
        reader.type("")
        reader.see(title)
    assert reader.end() == 0


def test_what_is_built_gets_a_file_of_its_own(directory: Path) -> None:
    course = Path(__file__).resolve().parents[2] / "lessons"
    (directory / "templates").mkdir()
    template = (course / "templates" / "my_scheduler.py").read_text()
    (directory / "templates" / "my_scheduler.py").write_text(template)
    lesson = LESSON[: LESSON.index("def my_twice")] + 'from paged_ref.lesson import build\nbuild("my_schedule")\n'
    (directory / "01_small.py").write_text(lesson)
    mine = directory / "my_scheduler.py"
    reader = Reader(directory, "1", "--part", "4")
    reader.see("my_scheduler.py is made: write there.")
    assert mine.read_text() == template
    reader.see("my_schedule is yours to write (admit and run): 20 lines, in my_scheduler.py")
    mine.write_text(template.replace('todo("20 lines")', "return [(seq, 1) for seq in waiting]"))
    reader.see("q: leave]")
    reader.type("r")
    reader.see("sequence 0 is planned, and is not in `running`")
    mine.write_text((course / "solutions" / "my_scheduler.py").read_text())
    reader.see("q: leave]")
    reader.type("r")
    reader.see("[Enter: what it prints]")
    reader.type("r")
    reader.see("'r' is none of the keys.")
    reader.see("[Enter: what it prints]")
    reader.type("")
    reader.see("my_schedule is right")
    reader.see("42 steps; the package's scheduler takes 42")
    reader.see("q: leave]")
    reader.type("q")
    assert reader.end() == 0
    assert progress(directory)["exercises"] == {"my_schedule": True}


def test_watch_runs_again_at_each_save(directory: Path) -> None:
    reader = Reader(directory, "1", "--watch")
    reader.see("my_twice is yours to write")
    reader.see("runs again when 01_small.py is saved")
    for code, sentence in (("return number +", "SyntaxError"), ("return 2 * number", "right in all 2 cases")):
        answer(directory, code)
        os.utime(directory / "01_small.py", (time.time() + 5, time.time() + 5 + len(code)))
        reader.see(sentence)
        reader.see("runs again when 01_small.py is saved")
    (directory / "01_small.py").unlink()
    reader.see("01_small.py cannot be read: No such file or directory")
    reader.see("runs again when 01_small.py is saved")
    answer(directory, "return 2 * number")
    reader.see("right in all 2 cases")
    reader.see("runs again when 01_small.py is saved")
    reader.interrupt()
    assert reader.end() == 130
    assert progress(directory)["exercises"] == {"my_twice": True}
