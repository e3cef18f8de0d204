"""`paged-ref lesson` in a pipe: one lesson, the list, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paged_ref.cli import main
from paged_ref.lesson.progress import LessonRecord, Progress
from paged_ref.views.common.program import program


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    head = '"""Lesson {}: number {}\n\nQuestion: which?\nTime: 15 minutes. Short.\n"""\n\n# ## Run\n#\n# Text.\n\n{}\n'
    (tmp_path / "01_one.py").write_text(head.format(1, "one", "print('ran', 40 + 2)"))
    (tmp_path / "02_two.py").write_text(head.format(2, "two", "print(1 / 0)"))
    return tmp_path


def test_a_lesson_in_a_pipe_shows_and_runs_all_and_waits_for_no_key(
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
    assert "lesson_code.py" not in out
    (folder / "02_two.py").write_text((folder / "02_two.py").read_text() + "print(\n")
    assert main(["lesson", "2", "--lessons", str(folder)]) == 1
    assert "SyntaxError" in capsys.readouterr().out


def test_a_wrong_exercise_is_status_1_in_a_pipe_and_an_open_one_0(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (folder / "01_one.py").read_text() + (
        "from paged_ref.lesson import check, todo\n\n\ndef my_f(x):\n    return todo('1 line')\n\n\n"
        "check(my_f, spec=lambda x: 2 * x, cases=[(3,)], hint='twice')\n"
    )
    for answer, status in (("todo('1 line')", 0), ("3 * x", 1), ("float(2 * x)", 1), ("2 * x", 0)):
        (folder / "01_one.py").write_text(source.replace("todo('1 line')", answer))
        assert main(["lesson", "1", "--lessons", str(folder)]) == status, answer
    assert capsys.readouterr().out.endswith(f"Solved. Next: {program()} lesson 2, number two.\n")


def test_the_list_shows_what_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lesson", "--lessons", str(folder)]) == 0
    assert f"Go on with: {program()} lesson 1\n" in capsys.readouterr().out
    main(["lesson", "1", "--lessons", str(folder)])
    assert not Progress().lessons, "a pipe has no reader"
    Progress().save("01_one", LessonRecord(part=0, exercises={"my_f": True}))
    (folder / "02_two.py").write_text("def\n")
    capsys.readouterr()
    assert main(["lesson", "--lessons", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "to the end" in out
    assert "✓ solved" in out
    assert "not readable" in out
    assert f"Go on with: {program()} lesson 2\n" in out


def test_the_list_counts_exercises_and_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lesson with one of two exercises solved is not solved, and comes next; the numbers may have gaps."""
    source = (folder / "01_one.py").read_text().replace("Lesson 1", "Lesson 4")
    (folder / "04_four.py").write_text(source + "\ndef both():\n    check()\n    build()\n")
    for name, solved in (("01_one", ["my_f"]), ("02_two", ["my_f"]), ("04_four", ["my_f"])):
        Progress().save(name, LessonRecord(part=0, exercises=dict.fromkeys(solved, True)))
    assert main(["lesson", "--lessons", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "1 of 2" in out
    assert f"Go on with: {program()} lesson 4\n" in out
    assert main(["lesson", "3", "--lessons", str(folder)]) == 2
    assert "lesson is 3; known are 1 to 2 and 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["9"], "lesson is 9; known are 1 to 2"),
        (["1", "--part", "4"], "--part is 4; lesson 1 has the parts 1 to 1"),
        (["--watch"], "--watch needs the number of a lesson"),
        (["1", "--part", "1", "--watch"], "--watch runs the whole lesson"),
        (["--part", "1"], "--part needs the number of a lesson"),
        (["--json"], "--json is given; it goes with --grade FILE"),
        (["1", "--grade", "x.py"], "--grade is x.py, and number is given"),
        (["--grade", "absent.py"], "--grade is absent.py: No such file or directory"),
        (["--grade", __file__], "it is no lesson, and defines none of my_scores"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert main(["lesson", *argv, "--lessons", str(folder)]) == 2
    assert sentence in capsys.readouterr().err


LESSONS = Path(__file__).resolve().parents[2] / "lessons"


def grade(capsys: pytest.CaptureFixture[str], path: Path, status: int) -> list[dict[str, Any]]:
    assert main(["lesson", "--grade", str(path), "--json"]) == status
    grades: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return grades


def test_a_teacher_grades_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 for right and open exercises, 1 for a wrong one; the file may lie anywhere."""
    path = tmp_path / "of_anna.py"
    hole = 'return todo("2 lines")'
    source = (
        '"""Lesson 5: slots\n\nQuestion: which?\nTime: 15 minutes. Short.\n"""\n\n'
        "from paged_ref.core.attention.addressing import slot_of\nfrom paged_ref.lesson import check, todo\n\n\n"
        f"def my_slot_of(block_table, position, block_size):\n    {hole}\n\n\n"
        "check(my_slot_of, spec=slot_of, cases=[([7, 1], 5, 4), ([7, 1], 2, 4)], hint='two lines')\n"
    )
    path.write_text(source)
    assert grade(capsys, path, 0) == [{"name": "my_slot_of", "state": "open", "said": ["2 lines"]}]
    path.write_text(source.replace(hole, "return block_table[position // block_size] * block_size"))
    (wrong,) = grade(capsys, path, 1)
    assert wrong["state"] == "wrong"
    assert wrong["said"] == ["call   my_slot_of([7, 1], 5, 4)", "yours  4", "spec   5"]
    solved = "return block_table[position // block_size] * block_size + position % block_size"
    path.write_text(source.replace(hole, solved.replace("//", "/")))
    assert f"line 12 of of_anna.py, `{solved.replace('//', '/')}`: TypeError: " in grade(capsys, path, 1)[0]["said"][0]
    path.write_text(source.replace(hole, f"print('hello')\n    {solved}"))
    assert grade(capsys, path, 0) == [{"name": "my_slot_of", "state": "right", "said": []}]
    path.write_text("def my_slot_of(:")
    assert grade(capsys, path, 1)[0]["name"] == path.name


def test_a_file_of_the_readers_own_is_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my_scheduler.py"
    path.write_text((LESSONS / "solutions" / path.name).read_text())
    assert [each["state"] for each in grade(capsys, path, 0)] == ["right"]
    assert main(["lesson", "--grade", str(path)]) == 0
    assert capsys.readouterr().out == "✓ my_schedule: right\n"
    path.write_text("def my_schedule(*args):\n    return []\n")
    (wrong,) = grade(capsys, path, 1)
    assert wrong["said"][0].endswith("step 1 runs (sequence: tokens)")
    assert wrong["said"][1:] == ["yours  nothing", "spec   0: 3"]


def test_without_lessons_it_says_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_ref.lesson import command

    assert main(["lesson", "--lessons", str(tmp_path)]) == 2
    assert "no file NN_name.py is in it" in capsys.readouterr().err
    monkeypatch.setattr(command, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(command, "_INSTALLED", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["lesson"]) == 2
    assert "in the folder lessons/ of the project's repository" in capsys.readouterr().err


def test_the_lessons_of_an_installed_package_are_copied_to_be_edited(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from paged_ref.lesson import command

    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    monkeypatch.setattr(command, "_CHECKOUT", here)
    monkeypatch.setattr(command, "_INSTALLED", folder)
    assert main(["lesson"]) == 0
    assert f"To edit them: {program()} lesson --copy lessons\n" in capsys.readouterr().out
    assert main(["lesson", "--copy", "lessons"]) == 0
    assert f"Go on with: {program()} lesson 1\n" in capsys.readouterr().out
    (here / "lessons" / "01_one.py").write_text((folder / "01_one.py").read_text().replace("40", "50"))
    assert main(["lesson", "1"]) == 0
    assert "ran 52" in capsys.readouterr().out
    assert main(["lesson", "--copy", "lessons"]) == 2
    assert "--copy is lessons; a folder that does not exist yet is needed" in capsys.readouterr().err
    assert main(["lesson", "--copy", "mine"]) == 0
    assert "lesson 1 --lessons mine\n" in capsys.readouterr().out.replace("./", "")
    assert main(["lesson", "--copy", "lessons/mine"]) == 2
    assert "a folder outside the lessons" in capsys.readouterr().err
