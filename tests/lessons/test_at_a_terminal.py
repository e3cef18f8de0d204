"""Each lesson, read at a pseudo terminal from its first line to its last, with Enter at every question."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lesson_reader import Reader

from paged_ref.lesson import lesson_script

LESSONS = Path(__file__).resolve().parents[2] / "lessons"
PATHS = lesson_script.find(LESSONS)
MADE = {8: ["my_kernel.py"], 9: ["my_kernel.py"], 11: ["my_scheduler.py"], 21: ["my_cache.py"]}
FAST = 6  # the number of the lesson that is not left to the slow tests
NUMBERS = [
    pytest.param(int(path.name[:2]), marks=() if int(path.name[:2]) == FAST else pytest.mark.slow) for path in PATHS
]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_reader_comes_to_the_last_line(number: int, tmp_path: Path) -> None:
    (path,) = (path for path in PATHS if path.name.startswith(f"{number:02}_"))
    lesson = lesson_script.read(path)
    reader = Reader(tmp_path, str(number), lessons=LESSONS)
    said = reader.press_enter_to_the_end(600)
    assert reader.end() == 0
    assert "Traceback" not in said
    for part in lesson.parts:
        assert part.title in said
    last = lesson.parts[-1].passages[-1].text.split()[-3:]  # words of the last line
    assert [word for word in last if word.strip("`") not in said] == []
    assert "Still to write" in said
    assert [file.name for file in tmp_path.glob("my_*.py")] == MADE.get(number, [])
