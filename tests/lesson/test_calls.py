"""Claims that do not hold, and planted bugs that something else catches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paged_ref import lesson
from paged_ref.lesson.lesson_session import ClaimError, LessonSession, running
from paged_ref.lesson.progress import Progress


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
