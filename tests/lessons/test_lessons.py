"""The lessons themselves: each runs to its end, starts unsolved, can be solved, and says only what it shows."""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref.cli import main
from paged_ref.lesson import lesson_script
from paged_ref.lesson.building import FILES
from paged_ref.lesson.grading import grade
from paged_ref.lesson.lesson_code import run_quietly
from paged_ref.lesson.lesson_session import LessonSession, running
from paged_ref.lesson.progress import Progress
from paged_ref.planner import assess, steady
from paged_ref.planner.setup import Setup
from paged_ref.views.common.console import Console

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "lessons"
PATHS = lesson_script.find(LESSONS)
BUILT = {name for _, names in FILES.values() for name in names}  # in files of the reader's own
HEADINGS = ["Predict", "Run", "What must hold", "Exercise", "In production systems", "Next"]

# With this scope, all tests of a lesson come together, so that one process runs the lesson, twice in all: see `run`.
each_lesson = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem, scope="module")


@pytest.fixture(scope="module", autouse=True)
def each_simulation_runs_once() -> Iterator[None]:
    """A lesson runs twice, and simulates the same both times, unless it has patched what makes the manager."""
    real = steady.steady_state
    remembered = functools.cache(lambda setup, trace, make_manager: real(setup, trace))
    with pytest.MonkeyPatch.context() as patch:
        for module in (steady, assess):
            patch.setattr(module, "steady_state", lambda setup, trace: remembered(setup, trace, Setup.make_manager))
        yield


@functools.cache
def run(path: Path, solutions: bool = False) -> tuple[LessonSession, str]:
    """The session after a run without a terminal, and what was printed."""
    out = io.StringIO()
    progress = Progress(Path(os.devnull) / "nowhere")
    console = Console(file=out, width=100)
    session = LessonSession(path.stem, path.parent, progress, False, solutions, console, workplace=Path(os.devnull))
    with redirect_stdout(out):
        went_well = run_quietly(path, session)
    assert went_well, out.getvalue()
    return session, out.getvalue()


def functions_in(path: Path) -> dict[str, Callable[..., Any]]:
    namespace: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return {name: value for name, value in namespace.items() if name.startswith("my_")}


# --- runs ----------------------------------------------------------------------------------------------


@each_lesson
def test_it_runs_to_its_end_with_every_exercise_open(path: Path) -> None:
    session, _ = run(path)
    assert session.exercises
    assert {e.name: e.verdict.state for e in session.exercises.values()} == dict.fromkeys(session.exercises, "pending")
    assert session.caught, "no bug was planted and caught"


@pytest.mark.slow  # each lesson three times more
@each_lesson
def test_each_part_runs_again_and_says_the_same(path: Path) -> None:
    """The key r: a part leaves what the parts before it have made as it was."""
    out = io.StringIO()
    progress, console = Progress(Path(os.devnull) / "nowhere"), Console(file=out, width=100)
    session = LessonSession(path.stem, path.parent, progress, False, True, console, workplace=Path(os.devnull))
    lesson = lesson_script.read(path)
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    with redirect_stdout(out), running(session):
        for part in (lesson.imports, *lesson.parts):
            texts = []
            for _ in range(2):
                out.truncate(out.seek(0))
                session.exercises.clear()
                for passage in part.passages:
                    if passage.kind == "code":
                        lesson_script.execute(passage, path, namespace)
                texts.append(out.getvalue())
            assert texts[0] == texts[1], part.title


@pytest.mark.slow  # some seconds for each command
@each_lesson
def test_the_pictures_that_it_names_can_be_seen(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.jsonl").symlink_to(tmp_path / "run.jsonl")
    assert main(["generate", "--prompt", "The cat", "--max-tokens", "4", "--record", "run.jsonl"]) == 0
    (next_part,) = (part for part in lesson_script.read(path).parts if part.title == "Next")
    named = re.findall(r"`paged-ref ([^`]+)`", "\n".join(passage.text for passage in next_part.passages))
    assert named
    for command in named:
        argv = shlex.split(command.replace("FILE", str(ROOT / "README.md")).replace("--steps 20", "--steps 1"))
        if argv[0] in ("viz", "walk", "train"):
            assert main([*argv, *(["--every", "block"] if argv[0] == "walk" else [])]) == 0, command
            capsys.readouterr()


@each_lesson
def test_with_solutions_every_check_passes(path: Path) -> None:
    session, _ = run(path, solutions=True)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("my_")]
    names += names_built_in(tree)
    assert {e.name: e.verdict.state for e in session.exercises.values()} == dict.fromkeys(names, "right")


def names_built_in(tree: ast.Module) -> list[str]:
    """What a lesson asks for with build()."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "build"]
    return [ast.literal_eval(call.args[0]) for call in calls]


@each_lesson
def test_the_solutions_are_the_exercises_and_nothing_else(path: Path) -> None:
    solutions = LESSONS / "solutions" / path.name
    if not solutions.exists():  # all is built in files of the reader's own: test_building.py
        assert set(run(path)[0].exercises) <= BUILT
        return
    tree = ast.parse(solutions.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert names == set(run(path)[0].exercises) - BUILT
    assert all(isinstance(node, (ast.FunctionDef, ast.Import, ast.ImportFrom)) for node in tree.body)


@each_lesson
def test_plausible_wrong_answers_are_refused(path: Path) -> None:
    session, _ = run(path, solutions=True)
    exercises = [exercise for name, exercise in session.exercises.items() if name not in BUILT]
    answers = functions_in(LESSONS / "solutions" / "wrong" / path.name) if exercises else {}
    for exercise in exercises:
        wrong = {name: answer for name, answer in answers.items() if name.startswith(f"{exercise.name}__")}
        assert len(wrong) >= 5, exercise.name
        for name, answer in wrong.items():
            verdict = grade(answer, exercise.spec, exercise.cases)
            assert verdict.state == "wrong", name
            assert verdict.error is None, f"{name} is wrong by an error: {verdict.error!r}"
            assert verdict.yours != verdict.spec or verdict.difference, name
        verdict = grade(lambda *case, spec=exercise.spec: in_another_type(spec(*case)), exercise.spec, exercise.cases)
        assert "is expected, not" in verdict.difference, f"{exercise.name} in another type"


def in_another_type(value: Any) -> Any:
    """The same, and no answer: 8.0 for 8, a list for an array."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist() if isinstance(value, np.ndarray) else str(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return float(value) if type(value) is int else str(value)


# --- form ----------------------------------------------------------------------------------------------


@each_lesson
def test_it_has_the_form_of_a_lesson(path: Path) -> None:
    lesson = lesson_script.read(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lesson.number == int(path.name[:2])
    assert lesson.question.endswith("?")
    assert 15 <= lesson.minutes <= (90 if names_built_in(ast.parse("\n".join(lines))) else 20)
    assert 80 <= len(lines) <= 200
    assert max(map(len, lines)) <= 76
    titles = [part.title for part in lesson.parts]
    assert [title for title in titles if title in HEADINGS] == HEADINGS
    assert titles[-1] == "Next"
    source = "\n".join(lines)
    for call in ("predict(", ".grade(", "claim(", "break_it("):
        assert call in source, call
    assert "build(" in source or ("check(" in source and "todo(" in source)
    graded = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and is_grade(node)]
    assert all("why" in {keyword.arg for keyword in call.keywords} for call in graded), "an answer is not derived"
    assert re.search(r"`paged-ref (viz|walk|demo|long|train|monitor|compare)\b", source.partition("# ## Next")[2])
    assert "table(" in source or "show(" in source
    assert all(
        passage.text.count("\n") < 24 for part in lesson.parts for passage in part.passages if passage.kind == "code"
    )


def is_grade(call: ast.Call) -> bool:
    """guess.grade(...)"""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "grade"


@each_lesson
def test_its_prose_has_no_number_that_its_run_does_not_show(path: Path) -> None:
    """A number in prose is a setting (in the code), printed by the run, or its paragraph names a source."""
    lesson = lesson_script.read(path)
    known = numbers_in(run(path)[1]) | constants_in(path)
    prose = [passage.text for part in lesson.parts for passage in part.passages if passage.kind == "prose"]
    head = lesson.head.partition("Time:")[2].partition("\n")[2]
    for paragraph in "\n\n".join([head, *prose]).split("\n\n"):
        if not re.search(r"et al\. \d{4}|recorded/", paragraph):
            unknown = numbers_in(paragraph) - known
            assert not unknown, f"{sorted(unknown)} in: {paragraph}"


def numbers_in(text: str) -> set[float]:
    """Numbers that stand alone: not those of names (float32), of code in backticks, of lessons and figures."""
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\b([Ll]essons?|Fig\.|Figures?|Table|§|Python|CUDA) ?\d[\d.]*( (to|and) \d+)?", "", text)
    found = re.findall(r"(?<![\w.§])\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\w.§])\d+(?:\.\d+)?(?!\w)", text)
    return {float(number.replace(",", "")) for number in found}


def constants_in(path: Path) -> set[float]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants: list[Any] = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {float(value) for value in constants if type(value) in (int, float)}


def test_numbers_are_found_where_they_claim_something() -> None:
    assert numbers_in("it holds 1,234 slots, 20.5% of 3 blocks") == {1234, 20.5, 3}
    assert numbers_in("float32 in `x[5]`, lesson 4, Fig. 6, §7.2, lessons 2 to 4") == set()


# --- seams ---------------------------------------------------------------------------------------------


def names_patched_in(path: Path) -> set[str]:
    """What the lesson gives to plug_in() and break_it(), as "owner.name", as the lesson calls the owner."""
    places: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="plug_in"), args=[place, *_]):
                places.append(place)
            case ast.keyword(arg="where", value=place) | ast.Assign(targets=[ast.Name(id="where")], value=place):
                places.append(place)
    pairs = [place.elts for place in places if isinstance(place, ast.Tuple)]
    return {f"{ast.unparse(owner)}.{ast.literal_eval(name)}" for owner, name in pairs}


def test_the_names_that_lessons_patch() -> None:
    """The seams: a change of one of these names changes a lesson."""
    assert {path.stem[:2]: names_patched_in(path) for path in PATHS} == {
        "01": {"Engine.prepare_inputs"},
        "02": {"engine.format_bytes_per_token"},
        "03": {"RegionPool.release", "StandardManager.region_size"},
        "04": {"KVCache.apply"},
        "05": {"paged.PagedManager.slots", "paged.slot_of"},
        "06": {"BlockPool.release", "PagedManager.free"},
        "07": {"kv.attend"},
        "08": {"naive.attention_kernel"},
        "09": {"paged.attention_kernel"},
        "10": {"kernel_api.merge_states"},
        "11": {"Engine.prepare_inputs"},
        "12": {"PagedManager.append"},
        "13": {"prefix_cache.block_digests"},
        "14": {"KVCache.apply"},
        "15": {"Extremes.bounds"},
        "16": {"CopyStream.back_planes"},
        "17": {"llm.make_manager"},
        "18": {"setup.Setup.make_manager"},
        "19": {"PagedManager.writes_shared_block"},
        "20": {"plan.unpack"},
        "21": {"PagedManager.free"},
    }


@each_lesson
def test_it_touches_no_private_name_and_no_source(path: Path) -> None:
    """Not as a patched name, not as an attribute, not by import; and no code is made of a changed source text."""
    names = {name for patched in names_patched_in(path) for name in patched.split(".")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Name):
            names |= {node.id} & {"exec", "eval", "compile"}
    assert not names & {"exec", "eval", "compile"}
    assert not {name for name in names if name.startswith("_") and not name.endswith("__")}


# --- the path ------------------------------------------------------------------------------------------


def test_the_list_agrees_with_the_files() -> None:
    text = (LESSONS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| \[(.+?)\]\((\S+?)\) \| (\d+) \| (.+?) \|$", text, re.MULTILINE)
    lessons = [lesson_script.read(path) for path in PATHS]
    assert [(int(n), title, file, int(minutes), question) for n, title, file, minutes, question in rows] == [
        (lesson.number, lesson.title, lesson.path.name, lesson.minutes, lesson.question) for lesson in lessons
    ]
    numbers = [lesson.number for lesson in lessons]
    assert numbers == sorted(set(numbers))


def test_a_lesson_is_a_script() -> None:
    path = PATHS[0]
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "is yours to write" in done.stdout
    assert not done.stderr


def measured_rows() -> list[tuple[str, str, int]]:
    """Of lessons/README.md: what is measured, the number, and the lesson that prints it."""
    section = (LESSONS / "README.md").read_text(encoding="utf-8").partition("## Measured")[2]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `lesson (\d+)` \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n| ") - 1, "a row without its lesson"
    return [(what, measured, int(number)) for what, measured, number in rows]


def test_each_measured_result_has_its_lesson() -> None:
    rows = measured_rows()
    assert len(rows) > 20
    assert {number for _, _, number in rows} <= {int(path.name[:2]) for path in PATHS}


@each_lesson
def test_each_measured_result_is_printed_by_its_lesson(path: Path) -> None:
    for what, measured, number in measured_rows():
        if number == int(path.name[:2]):
            assert numbers_in(measured) <= numbers_in(run(path)[1]), what


def test_a_lesson_is_a_page_of_the_book() -> None:
    page = runpy.run_path(str(ROOT / "book" / "lesson_page.py"))["page"](PATHS[5])
    assert "## What it uses\n\n```python\nfrom copy import deepcopy\n\nfrom paged_ref.lesson import" in page
    assert 'hint = (\n    "..."' in page
    assert "<summary>Hint for <code>my_release</code></summary><p>A block can be in several tables." in page
