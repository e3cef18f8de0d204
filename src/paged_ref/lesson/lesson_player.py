"""A lesson shown and run, part by part: prose as Markdown, code with colours, then the code's output."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from . import lesson_script
from .editor import edit, line_of
from .hints import give_hint
from .lesson_code import LessonCode, file_problem, saved_at
from .lesson_script import Passage
from .lesson_session import CountedOutput, Exercise, LessonSession, python_code, read_line, relative_path, running

PROSE_WIDTH = 88  # columns: longer lines are hard to read


class LessonPlayer:
    """One reader in one lesson. Without a terminal nothing is asked and nothing waits."""

    def __init__(self, path: Path, session: LessonSession) -> None:
        """Raises SyntaxError if Python cannot parse the file, OSError or ValueError if it is no lesson."""
        self.session = session
        self.code = LessonCode(path, session)
        self._output = CountedOutput()
        self._plain = session.console.is_dumb_terminal or not session.interactive
        self._number = 0  # the part that is played; 0 is the head
        self._shown: dict[int, list[str]] = {0: []}  # part -> what was printed for it
        self._exercises: dict[int, list[str]] = {}  # part -> its exercises
        self._unseen = False  # what is shown is kept, and not printed

    def play(self, first: int = 1) -> bool:
        """Play from part `first` on; earlier parts run unseen. False: an error ended the lesson. Raises Leave."""
        session, script = self.session, self.code.script
        session.before_ask, session.after_ask = self._release, self._say_running
        with running(session), self._output.redirected():
            number = first if 1 <= first <= len(script.parts) else 1
            below_title = script.head.partition("\n\n")[2].replace("\nTime:", "  \nTime:")
            heading = Rule(f"Lesson {script.number}: {script.title}", characters="═", align="left")
            self._show(heading, Text(), Markdown(below_title))
            if not self._run_held(script.imports.passages):
                return False
            if number > 1:
                self._play_unseen(number - 1)
            while number <= len(script.parts):
                self._save_part(number)
                went_well = self._play_part(number)
                if not (went_well or session.interactive):
                    return False
                number = self._ask_what_next(went_well) if session.interactive else number + 1
            self._save_part(0)
        return True

    def _save_part(self, number: int) -> None:
        """Save the farthest part that the reader has reached; 0 is the end. Without a reader nothing is saved."""
        session = self.session
        if session.interactive:
            record = session.progress.of(session.lesson)
            record.part = 0 if 0 in (number, record.part) else max(number, record.part)
            session.progress.save(session.lesson, record)

    # --- parts -------------------------------------------------------------------------------------

    def _play_part(self, number: int) -> bool:
        """Show the part and run it. False: an error, which is shown, ended it."""
        parts = self.code.script.parts
        part = parts[number - 1]
        self._number, self._shown[number] = number, []
        for later in [each for each in self._exercises if each >= number]:  # their verdicts are those of an earlier run
            for name in self._exercises.pop(later):
                self.session.exercises.pop(name, None)
        self.session.checked = self._exercises[number] = []
        self._show(Text(), Rule(f"{number} of {len(parts)}: {part.title}", align="left"))
        for passage in part.passages:
            if passage.kind == "prose":
                self._show(Text(), Markdown(passage.text))
                continue
            self._show(Text(), python_code(code_to_read(passage.text), passage.harness), Text())
            if not self._run_held([passage]):
                return False
        return True

    def _run_held(self, passages: Sequence[Passage]) -> bool:
        """Run the code; a reader sees its output when it has run, or asks. False: an error ended it."""
        if not (self.session.interactive or self._unseen):
            return self.code.run(passages)
        self._say_running()
        self._output.held = []
        try:
            went_well = self.code.run(passages)
        except BaseException:  # Leave, or Ctrl-C
            held, self._output.held = self._output.held or [], None
            self._erase_running()
            self._output.write("".join(held))
            raise
        self._release()
        self._output.held = None
        return went_well

    def _play_unseen(self, count: int) -> None:
        """Play the first `count` parts without printing them: later parts use what their code makes."""
        session = self.session
        session.say(f"From part {count + 1} on. The parts before it run again unseen: b goes back to them.", "dim")
        self._say_running()
        session.interactive, self._unseen = False, True
        try:
            went_well = all(self._play_part(number) for number in range(1, count + 1))
        finally:
            session.interactive, self._unseen = True, False
            self._erase_running()
        if not went_well:
            session.say("One of them stopped at an error: begin with --part 1.", "yellow")

    # --- the reader --------------------------------------------------------------------------------

    def _ask_what_next(self, went_well: bool) -> int:
        """The part to play next: the following one, or this or an earlier one from the file as it is. Raises Leave."""
        session, number = self.session, self._number
        to_do = [exercise for exercise in session.to_do if exercise.name in session.checked]
        keys = "Enter: on  r: run again" if went_well else "Enter: run again"
        keys += "  h: hint" if to_do else ""
        keys += "  e: edit  b: back  q: leave"
        while True:
            typed = self._wait(keys)
            if typed == "" and went_well:
                return number + 1
            if typed == "h" and to_do:
                give_hint(session, to_do[0])
            elif typed == "b":
                if (earlier := self._look_back()) < number:
                    return earlier
            elif typed == "e":
                if self._edit(to_do) and self._read_again():
                    return number
            elif typed not in ("", "r"):
                session.say(f"{typed!r} is none of the keys.", "yellow")
            elif self._read_again():
                return number

    def _look_back(self) -> int:
        """Show the parts before, as they were. The part that the reader runs again, or the one that is played."""
        at = self._number - 1
        while True:
            self._output.rows = 0
            for text in list(self._shown[at]):
                self._print(text, "more", keep=False)
            if at == self._number:
                return at
            runs = "  r: run again from here" if at else ""
            while (typed := self._wait(f"Enter: on{runs}  b: back  q: leave")) not in ("", "b"):
                if typed != "r" or not at:
                    self.session.say(f"{typed!r} is none of the keys.", "yellow")
                elif self._read_again():
                    return at
            at = max(at - 1, 0) if typed == "b" else at + 1

    def _edit(self, to_do: Sequence[Exercise]) -> bool:
        """Open the editor where the reader writes. True: the file was changed, by an editor that has ended."""
        path = to_do[0].file if to_do else self.code.script.path
        passages = self.code.script.parts[self._number - 1].passages
        line = line_of(path, to_do[0].name) if to_do else next((p.line for p in passages if p.kind == "code"), 1)
        before = saved_at(path)
        try:
            edit(path, line)
        except ValueError as error:
            self.session.say(f"{error}. The place: {relative_path(path)}, line {line}.", "yellow")
        return saved_at(path) != before

    def _read_again(self) -> bool:
        """Read the file again. False, after an explanation, if the lesson cannot go on with it."""
        linecache.checkcache()
        before = self.code.script
        try:
            again = lesson_script.read(before.path)
        except (SyntaxError, ValueError, OSError) as error:
            self.session.say(file_problem(before.path, error), "red")
            return False
        if len(again.parts) != len(before.parts):
            self.session.say("The file has other parts now; leave with q and start the lesson again.", "yellow")
            return False
        self.code.script = again
        return self.code.run(again.imports.passages)

    def _wait(self, keys: str) -> str:
        """A line typed by the reader, after which the prompt is erased. Raises Leave at q and at the end of input."""
        _forget_keys()
        typed = read_line(f"[{keys}] " if self._plain else f"\x1b[2m[{keys}]\x1b[0m ")
        self._output.rows = 0
        if not self._plain:
            rows = 1 + (len(f"[{keys}] {typed}") - 1) // self.session.console.width
            self._output.stream.write("\r" + "\x1b[1A\x1b[2K" * rows)  # one row up, and empty it
        return typed.lower()

    # --- output ------------------------------------------------------------------------------------

    def _show(self, *pictures: RenderableType) -> None:
        console = self.session.console
        with console.capture() as captured:
            for picture in pictures:
                wide = isinstance(picture, (Padding, Rule))
                console.print(picture, width=console.width if wide else min(console.width, PROSE_WIDTH))
        self._print(captured.get(), "more")

    def _print(self, text: str, what: str, keep: bool = True) -> None:
        """Print; where the screen is full, wait for Enter first, so that nothing scrolls away unread."""
        if keep:
            self._shown[self._number].append(text)
        if self._unseen:
            return
        full = 0 < self._output.rows > self.session.console.height - 2 - text.count("\n")
        while self.session.interactive and full and (typed := self._wait(f"Enter: {what}")):
            self.session.say(f"{typed!r} is none of the keys.", "yellow")
        self._output.write(text)

    def _release(self) -> None:
        """Print the output that a run has held back, before the reader is asked and at the end of the run."""
        held, self._output.held = self._output.held, None
        self._erase_running()
        if held:
            self._print("".join(held), "what it prints")
        self._output.held = None if held is None else []

    def _say_running(self) -> None:
        """A word at the place of the output that will come."""
        if not (self._plain or self._unseen):
            self._output.stream.write("\x1b[2mrunning ...\x1b[0m")
            self._output.stream.flush()

    def _erase_running(self) -> None:
        if not (self._plain or self._unseen):
            self._output.stream.write("\r\x1b[2K")


def code_to_read(code: str) -> str:
    """The code without what is not for the reader: a word for the formatter, and the hints, which h gives."""
    without = code.replace("  # fmt: skip", "")
    hint = r'\bhint ?= ?(\(\n(.*\n)*?\)|".*")'
    return re.sub(hint, lambda found: re.sub(r'".*"', '"..."', found[0]), without)


def _forget_keys() -> None:
    """Drop what was typed before the question: it is no answer."""
    with suppress(ImportError, OSError, ValueError):  # no such terminal: nothing was typed
        import termios

        with suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
