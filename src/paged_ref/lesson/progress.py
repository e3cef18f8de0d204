"""What a reader has done, in one file below the home folder: $XDG_STATE_HOME/paged_ref/lessons.json."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from ..extras.reading import JSON_LIMIT, parse_json, read_file
from ..views.common.files import write_json


class LessonRecord(msgspec.Struct):
    """What a reader has done in one lesson."""

    part: int = 1  # to go on with; 0 after the end
    exercises: dict[str, bool] = msgspec.field(default_factory=dict)  # that have been right at least once
    predictions: dict[str, float] = msgspec.field(default_factory=dict)  # by question


def default_path() -> Path:
    """The place that the XDG base directories give to lasting state; other systems use the same one."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~"), ".local", "state")
    if not base.is_absolute():  # a user whom the system does not know, as in a container, has no home
        base = Path(tempfile.gettempdir(), f"paged_ref-{os.getuid()}")
    return base / "paged_ref" / "lessons.json"


class Progress:
    """The records of the lessons that were begun, by the name of the lesson's file.

    Every change is written immediately, to a new file that then replaces the old one: a crash loses nothing.
    A file that is not progress is put aside; one that cannot be read is left alone, and one that cannot be written is
    named once in `warnings`.
    """

    def __init__(self, path: Path | None = None) -> None:
        """`path=None`: the user's own file."""
        self.path = default_path() if path is None else path
        self.warnings: list[str] = []
        self.lessons: dict[str, LessonRecord] = {}
        self._writes = True
        if not self.path.exists():
            return
        try:
            text = read_file(self.path, JSON_LIMIT).decode("utf-8", errors="replace")
        except ValueError as error:
            self.warnings.append(f"progress cannot be read: {error}")
            self._writes = False  # what is there may be progress after all
            return
        try:
            self.lessons = msgspec.convert(parse_json(text), type=dict[str, LessonRecord])
        except ValueError:
            self._put_aside()

    def _put_aside(self) -> None:
        problem, aside = f"{self.path} is not what was written there", self.path.with_suffix(".unreadable")
        try:
            self.path.replace(aside)
            self.warnings.append(f"{problem}; it is now {aside.name}, and a new one begins")
        except OSError as error:
            self.warnings.append(f"{problem}, and stays: {error.strerror}")

    def of(self, lesson: str) -> LessonRecord:
        """The record of this lesson, a new one if the lesson was not begun. After a change: save()."""
        return self.lessons.get(lesson) or LessonRecord()

    def save(self, lesson: str, record: LessonRecord) -> None:
        self.lessons[lesson] = record
        if not self._writes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, msgspec.to_builtins(self.lessons))
        except (OSError, ValueError) as error:
            warning = f"progress cannot be kept: {error}"
            if warning not in self.warnings:
                self.warnings.append(warning)
