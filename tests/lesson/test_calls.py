"""Claims that do not hold, and planted bugs that something else catches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paged_ref import lesson
from paged_ref.lesson.calls import Guess
from paged_ref.lesson.lesson_session import ClaimError, LessonSession, running
from paged_ref.lesson.progress import Progress


@pytest.fixture
def session(tmp_path: Path) -> LessonSession:
    return LessonSession("01_small", tmp_path, Progress(tmp_path / "lessons.json"), False)


def test_a_number_may_come_with_its_unit_and_must_be_one_of_those_asked_for(
    session: LessonSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["800 KiB", "1 Block", "30 %", "40 percent", "30", "2"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    session.interactive = True
    asked: tuple[tuple[str, tuple[int, ...]], ...] = (("KiB", ()), ("blocks", ()), ("percent", ()), ("percent", ()))
    with running(session):
        found = [lesson.predict(unit, unit, among).value for unit, among in (*asked, ("", (1, 2, 3)))]
    assert found == [800, 1, 30, 40, 2]
    assert "30 is none of 1, 2, 3" in capsys.readouterr().out


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


def test_a_planted_bug_must_be_caught_by_what_the_lesson_says(session: LessonSession) -> None:
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


def test_what_breaks_is_shown_in_words(session: LessonSession, capsys: pytest.CaptureFixture[str]) -> None:
    with running(session):
        lesson.break_it(
            "one is lost", where=(Books, "total"), bug=lambda real: lambda self: 2, run=lambda: Books().total(),
            caught_by="contract", text=lambda found: f"{found} apples",
        )  # fmt: skip
    out = capsys.readouterr().out
    assert "right:        3 apples" in out
    assert "with the bug: 2 apples" in out


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (128.0, "✓ Right: it is 128"),
        (130.0, "≈ Near: you said 130, it is 128"),
        (64.0, "✗ Not so: you said 64, it is 128"),
    ],
)
def test_a_near_miss_is_told_from_a_wrong_idea_and_the_answer_is_derived(
    value: float, words: str, session: LessonSession, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(session):
        Guess("How large?", "KiB", value).grade(128, why="2 x 64 = 128")
    out = capsys.readouterr().out
    assert words in out
    assert "2 x 64 = 128." in out
