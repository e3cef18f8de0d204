"""A lesson shown and run, part by part: prose as Markdown, code with colours, then the code's output."""

from __future__ import annotations

import linecache
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from rich.console import RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from . import lesson_script
from .lesson_script import Part, Passage
from .lesson_session import ClaimError, LessonSession, python_code, running

PROSE_WIDTH = 88  # columns: longer lines are hard to read
_HERE = str(Path(__file__).parent)


class Leave(Exception):  # noqa: N818  (the reader's wish, not an error)
    """The reader leaves the lesson, to go on another time."""


class CountedOutput:
    """Standard output that counts its rows. While `held` is a list, text is kept there and not printed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.rows = 0
        self.held: list[str] | None = None

    def write(self, text: str) -> int:
        if self.held is not None:
            self.held.append(text)
            return len(text)
        self.rows += text.count("\n")
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LessonPlayer:
    """One reader in one lesson. Without a terminal nothing is asked and nothing waits."""

    def __init__(self, path: Path, session: LessonSession) -> None:
        """Raises SyntaxError if Python cannot parse the file, ValueError if it is no lesson."""
        self.session = session
        self.script = lesson_script.read(path)
        self.namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
        self._output = CountedOutput(sys.stdout)

    def play(self, first: int = 1) -> bool:
        """Play from part `first` on; earlier parts run unseen. False: an error ended the lesson. Raises Leave."""
        session, script = self.session, self.script
        session.before_ask = self._release
        with running(session), redirect_stdout(self._output):
            number = first if 1 <= first <= len(script.parts) else 1
            below_title = script.head.partition("\n\n")[2].replace("\nTime:", "  \nTime:")
            heading = Rule(f"Lesson {script.number}: {script.title}", characters="═", align="left")
            self._show(heading, Text(), Markdown(below_title))
            if number > 1:
                self._run_unseen(number - 1)
            while number <= len(script.parts):
                self._save_part(number)
                went_well = self._play_part(number)
                if not (went_well or session.interactive):
                    return False
                if not session.interactive or self._ask_what_next(went_well):
                    number += 1
            self._save_part(0)
        return True

    def _save_part(self, number: int) -> None:
        """Save the part that the reader has reached; 0 is the end. Without a reader nothing is saved."""
        session = self.session
        if session.interactive:
            record = session.progress.of(session.lesson)
            record.part = number
            session.progress.save(session.lesson, record)

    # --- parts -------------------------------------------------------------------------------------

    def _play_part(self, number: int) -> bool:
        """Show the part and run it. False: an error, which is shown, ended it."""
        parts = self.script.parts
        part = parts[number - 1]
        self.session.checked.clear()
        self._show(Text(), Rule(f"{number} of {len(parts)}: {part.title}", align="left"))
        for passage in part.passages:
            if passage.kind == "prose":
                self._show(Text(), Markdown(passage.text))
                continue
            code = passage.text.replace("  # fmt: skip", "")  # a word for the formatter, not for the reader
            self._show(Text(), python_code(code), Text())
            self._output.held = [] if self.session.interactive else None
            try:
                if not self._run(passage):
                    return False
            finally:
                self._release()
                self._output.held = None
        return True

    def _run(self, passage: Passage) -> bool:
        try:
            lesson_script.execute(passage, self.script.path, self.namespace)
        except ClaimError as error:
            self.session.say(str(error), "bold red")
        except (Exception, SystemExit) as error:
            self.session.say(error_text(error), "red")
        else:
            return True
        return False

    def run_code(self, parts: Sequence[Part]) -> bool:
        """Run the code of these parts, without showing it. False: an error, which is shown, ended it."""
        return all(self._run(passage) for part in parts for passage in part.passages if passage.kind == "code")

    def _run_unseen(self, count: int) -> None:
        """Run the first `count` parts without output: later parts use what their code makes."""
        session = self.session
        session.say(f"From part {count + 1} on. The parts before it run again unseen; --part 1 begins anew.", "dim")
        session.interactive, interactive = False, session.interactive
        try:
            with redirect_stdout(StringIO()):
                went_well = self.run_code(self.script.parts[:count])
        finally:
            session.interactive = interactive
        if not went_well:
            session.say("One of them stopped at an error: begin with --part 1.", "yellow")

    # --- the reader --------------------------------------------------------------------------------

    def _ask_what_next(self, went_well: bool) -> bool:
        """True: the next part. False: the same part again, from the file as it is now. Raises Leave."""
        exercises = [self.session.exercises[name] for name in self.session.checked]
        open_ones = [exercise for exercise in exercises if exercise.verdict.state != "right"]
        keys = "Enter: on   r: this part again, from the file" if went_well else "Enter: this part again"
        keys += "   h: hint" if open_ones else ""
        while True:
            typed = self._wait(f"{keys}   q: leave")
            if typed == "h":
                for exercise in open_ones:
                    self.session.say(f"hint for {exercise.name}: {exercise.hint}")
            elif typed == "" and went_well:
                return True
            elif typed in ("", "r") and self._read_again():
                return False

    def _read_again(self) -> bool:
        """Read the file again. False, after an explanation, if the lesson cannot go on with it."""
        linecache.checkcache()
        try:
            again = lesson_script.read(self.script.path)
        except (SyntaxError, ValueError, OSError) as error:
            self.session.say(error_text(error), "red")
            return False
        if len(again.parts) != len(self.script.parts):
            self.session.say("The file has other parts now; leave with q and start the lesson again.", "yellow")
            return False
        self.script = again
        return True

    def _wait(self, keys: str) -> str:
        """A line typed by the reader, after which the prompt is erased. Raises Leave at q and at the end of input."""
        plain = self.session.console.is_dumb_terminal
        _forget_keys()
        typed = self.session.ask(f"[{keys}] " if plain else f"\x1b[2m[{keys}]\x1b[0m ")
        self._output.rows = 0
        if typed is None or typed.lower() in ("q", "quit", "exit"):
            raise Leave
        if not plain:
            sys.stdout.write("\r\x1b[1A\x1b[2K")  # one row up, and empty it
        return typed.lower()

    # --- output ------------------------------------------------------------------------------------

    def _show(self, *pictures: RenderableType) -> None:
        console = self.session.console
        with console.capture() as captured:
            for picture in pictures:
                wide = isinstance(picture, (Padding, Rule))
                console.print(picture, width=console.width if wide else min(console.width, PROSE_WIDTH))
        self._print(captured.get(), "more")

    def _print(self, text: str, what: str) -> None:
        """Print; where the screen is full, wait for Enter first, so that nothing scrolls away unread."""
        full = 0 < self._output.rows > self.session.console.height - 2 - text.count("\n")
        if self.session.interactive and full:
            self._wait(f"Enter: {what}")
        sys.stdout.write(text)

    def _release(self) -> None:
        """Print the output that a run has held back, before the reader is asked and at the end of the run."""
        held, self._output.held = self._output.held, None
        if held:
            self._print("".join(held), "what it prints")
        self._output.held = None if held is None else []


def watch(path: Path, make_session: Callable[[], LessonSession]) -> None:
    """Run the lesson again each time its file is saved, without asking; until Ctrl-C."""
    files, seen = [path], list[float]()
    while True:
        changed = seen
        with suppress(OSError):  # some editors remove the file for a moment while they save it
            changed = [file.stat().st_mtime for file in files]
        if changed == seen:
            time.sleep(0.2)
            continue
        linecache.checkcache()
        session = make_session()
        session.console.clear()
        run_quietly(path, session)
        files = [path, *(file for file in session.files if file.exists())]
        seen = [file.stat().st_mtime for file in files]
        session.say(f"{time.strftime('%H:%M:%S')}: {path.name} is run again when it is saved. Ctrl-C ends.", "dim")


def run_quietly(path: Path, session: LessonSession) -> bool:
    """Run the lesson without its prose, as `python lessons/NN_name.py` does. False: an error ended it."""
    try:
        player = LessonPlayer(path, session)
    except (SyntaxError, ValueError) as error:
        session.say(error_text(error), "red")
        return False
    with running(session):
        return player.run_code(player.script.parts)


def error_text(error: BaseException) -> str:
    """An error of the lesson's code, without the frames of this room."""
    last = "".join(traceback.format_exception_only(error)).rstrip()
    if isinstance(error, SyntaxError) or error.__traceback__ is None:
        return f"{last}\nMend the line and save. What you did so far is kept."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HERE)]
    return f"Traceback, the last call at the end:\n{''.join(traceback.format_list(frames[-6:]))}{last}"


def _forget_keys() -> None:
    """Drop what was typed before the question: it is no answer."""
    with suppress(ImportError, OSError, ValueError):  # no such terminal: nothing was typed
        import termios

        with suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
