"""What a reader has done, in one file below the home folder: $XDG_STATE_HOME/paged_ref/lessons.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def default_path() -> Path:
    """The place that the XDG base directories give to lasting state; other systems use the same one."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "paged_ref" / "lessons.json"


class Progress:
    """For each lesson (by the name of its file): the part reached, exercises solved, predictions made.

    Every change is written immediately, to a new file that then replaces the old one: a crash loses nothing.
    A file that cannot be read is put aside; one that cannot be written is named once in `warnings`.
    """

    def __init__(self, path: Path | None = None) -> None:
        """`path=None`: the user's own file."""
        self.path = default_path() if path is None else path
        self.warnings: list[str] = []
        self._lessons: dict[str, Record] = {}
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(known, dict) or not all(isinstance(record, dict) for record in known.values()):
                raise ValueError
            self._lessons = known
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self.warnings.append(f"progress cannot be read: {self.path}: {error.strerror}")
        except ValueError:
            self._put_aside()

    def _put_aside(self) -> None:
        aside = self.path.with_suffix(".unreadable")
        try:
            self.path.replace(aside)
            self.warnings.append(
                f"{self.path} is not what was written there; it is now {aside.name}, and a new one begins"
            )
        except OSError as error:
            self.warnings.append(f"{self.path} is not what was written there, and stays: {error.strerror}")

    def part(self, lesson: str) -> int:
        """The part to go on with: 1 at first, 0 after the end."""
        part = self._lessons.get(lesson, {}).get("part", 1)
        return part if isinstance(part, int) else 1

    def set_part(self, lesson: str, part: int) -> None:
        """0: the end."""
        self._set(lesson, "part", part)

    def was_begun(self, lesson: str) -> bool:
        return lesson in self._lessons

    def solved(self, lesson: str) -> list[str]:
        """The exercises that have been right at least once."""
        return sorted(self._table(lesson, "exercises"))

    def set_solved(self, lesson: str, exercise: str) -> None:
        """An exercise stays solved, also when the reader empties the hole to try again."""
        exercises = self._table(lesson, "exercises")
        if exercise not in exercises:
            self._set(lesson, "exercises", {**exercises, exercise: True})

    def prediction(self, lesson: str, question: str) -> float | None:
        value = self._table(lesson, "predictions").get(question)
        return float(value) if isinstance(value, (int, float)) else None

    def set_prediction(self, lesson: str, question: str, value: float) -> None:
        self._set(lesson, "predictions", {**self._table(lesson, "predictions"), question: value})

    def _table(self, lesson: str, key: str) -> dict[str, Any]:
        table = self._lessons.get(lesson, {}).get(key, {})
        return dict(table) if isinstance(table, dict) else {}

    def _set(self, lesson: str, key: str, value: Any) -> None:
        self._lessons.setdefault(lesson, {})[key] = value
        new = self.path.with_name(self.path.name + ".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self._lessons, indent=1) + "\n", encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            warning = f"progress cannot be kept: {self.path}: {error.strerror}"
            if warning not in self.warnings:
                self.warnings.append(warning)
