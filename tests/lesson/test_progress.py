"""Progress is kept, found again, and survives a file that is not progress."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from paged_ref.lesson.progress import LessonRecord, Progress, default_path


def test_progress_is_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lessons.json"
    progress = Progress(path)
    assert progress.of("05") == LessonRecord(part=1, exercises={}, predictions={})
    assert "05" not in progress.lessons
    record = LessonRecord(3, {"my_slot_of": True}, {"How many?": 4.0})
    progress.save("05", record)
    assert Progress(path).of("05") == record
    assert [p.name for p in path.parent.iterdir()] == ["lessons.json"]


def test_a_file_that_is_not_progress_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "lessons.json"
    nested, huge = "[" * 1000 + "]" * 1000, '{"05": {"part": 1' + "0" * 400 + "}}"
    for text in ("{", "[1]", '{"05": 3}', "\x00", nested, huge, '{"05": {"part": [1]}}'):
        path.write_text(text)
        progress = Progress(path)
        assert "is not what was written there" in progress.warnings[0]
        assert (tmp_path / "lessons.unreadable").read_text() == text
        progress.save("05", LessonRecord(part=2))
        assert Progress(path).of("05").part == 2


def test_entries_of_a_strange_kind_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "lessons.json"
    path.write_text(json.dumps({"05": {"part": "x", "exercises": 3, "predictions": {"How many?": "four"}}}))
    progress = Progress(path)
    assert progress.of("05") == LessonRecord()


@pytest.mark.parametrize("kind", ["zero", "pipe"])
def test_a_device_or_a_pipe_is_no_progress_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lessons.json"
    if kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    progress = Progress(path)
    assert progress.lessons == {}
    wanted = f"progress cannot be read: {path} cannot be read: it is a pipe or a device; a regular file is needed"
    assert progress.warnings == [wanted]
    progress.save("05", LessonRecord(part=2))  # waits for nothing
    assert progress.of("05").part == 2


def test_progress_that_cannot_be_kept_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    progress = Progress(tmp_path / "file" / "lessons.json")
    progress.save("05", LessonRecord(part=2))
    progress.save("05", LessonRecord(part=3))
    assert len(progress.warnings) == 1
    assert progress.of("05").part == 3


def test_a_user_without_a_home_has_a_place_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, under a number that the system does not know."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_path() == tmp_path / f"paged_ref-{os.getuid()}" / "paged_ref" / "lessons.json"
