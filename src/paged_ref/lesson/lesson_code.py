"""A lesson's code: run part by part for lesson_player.py, and without its prose after each save and for a grade."""

from __future__ import annotations

import linecache
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import lesson_script
from .lesson_script import Passage
from .lesson_session import ClaimError, CountedOutput, Leave, LessonSession, relative_path, running

_HERE = str(Path(__file__).parent)


class LessonCode:
    """The code of one lesson, and the names that it has bound."""

    def __init__(self, path: Path, session: LessonSession) -> None:
        """Raises SyntaxError if Python cannot parse the file, OSError or ValueError if it is no lesson."""
        self.session = session
        self.script = lesson_script.read(path)
        self.namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}

    def run(self, passages: Sequence[Passage]) -> bool:
        """Run the code among the passages. False: an error, which is shown, ended it."""
        return all(self._run(passage) for passage in passages if passage.kind == "code")

    def _run(self, passage: Passage) -> bool:
        try:
            lesson_script.execute(passage, self.script.path, self.namespace)
        except Leave:
            raise
        except ClaimError as error:
            self.session.say(str(error), "bold red")
        except (Exception, SystemExit) as error:
            self.session.say(error_text(error), "red")
        else:
            return True
        return False

    def run_all(self) -> bool:
        """The same for all parts."""
        parts = [self.script.imports, *self.script.parts]
        return all(self.run(part.passages) for part in parts)


def watch(path: Path, make_session: Callable[[], LessonSession]) -> None:
    """Run the lesson again each time a file of the reader is saved, without asking; until Ctrl-C.

    What the last run said stays on the screen until the next one has ended.
    """
    seen: dict[Path, float] = {path: -1.0}
    while True:
        changed = {file: saved_at(file) for file in seen}
        if changed == seen:
            time.sleep(0.2)
            continue
        if 0.0 in changed.values():  # some editors remove the file for a moment while they save it
            time.sleep(0.5)
            changed = {file: saved_at(file) for file in seen}
        linecache.checkcache()
        session = make_session()
        session.say(f"running {path.name} ...", "dim")
        output = CountedOutput()
        output.held = []
        with output.redirected():
            run_quietly(path, session)
        session.console.clear()
        output.stream.write("".join(output.held))
        seen = {file: changed.get(file) or saved_at(file) for file in [path, *session.files]}
        files = " or ".join(file.name for file in seen)
        session.say(f"{time.strftime('%H:%M:%S')}: runs again when {files} is saved. Ctrl-C ends.", "dim")


def saved_at(path: Path) -> float:
    """When the file was saved; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def run_quietly(path: Path, session: LessonSession) -> bool:
    """Run the lesson without its prose, as `python lessons/NN_name.py` does. False: an error ended it."""
    try:
        code = LessonCode(path, session)
    except (SyntaxError, ValueError, OSError) as error:
        session.say(file_problem(path, error), "red")
        return False
    with running(session):
        return code.run_all()


def file_problem(path: Path, error: Exception) -> str:
    """Why the file is no lesson."""
    if isinstance(error, OSError):
        return f"{relative_path(path)} cannot be read: {error.strerror}"
    said = "".join(traceback.format_exception_only(error)).rstrip() if isinstance(error, SyntaxError) else str(error)
    return f"{said}\nMend the line and save. What you did so far is kept."


def error_text(error: BaseException) -> str:
    """An error of the lesson's code, without the frames of this room."""
    last = "".join(traceback.format_exception_only(error)).rstrip()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HERE)]
    return f"Traceback, the last call at the end:\n{''.join(traceback.format_list(frames[-6:]))}{last}"
