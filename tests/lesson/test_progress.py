"""Progress is kept, found again, and survives a file that is not progress."""

from __future__ import annotations

import json
from pathlib import Path

from paged_ref.lesson.progress import Progress


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
