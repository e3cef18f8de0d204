"""A lesson shown and run, part by part: prose as Markdown, code with colours, then what the code prints."""

from __future__ import annotations

import linecache
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

from . import script
from .screen import Screen, forget_keys
from .script import Block, Script
from .session import ClaimError, Session, running

_PROSE = 88  # columns: longer lines are hard to read
_HERE = str(Path(__file__).parent)


class Leave(Exception):  # noqa: N818  (the reader's wish, no error)
    """The reader goes, and comes back another time."""


class Player:
    """One reader in one lesson. Without a terminal nothing is asked and nothing waits."""

    def __init__(self, path: Path, session: Session) -> None:
        """Raises SyntaxError where the file cannot be read."""
        self.session = session
        self.script = script.read(path)
        self.namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
        self._screen = Screen(sys.stdout)

    def play(self, first: int = 1) -> bool:
        """From part `first` on; what comes before runs unseen. False: it stopped at an error. Raises Leave."""
        session = self.session
        with running(session), self._counted():
            if not 1 <= first <= len(self.script.parts):
                first = 1
            heading = f"Lesson {self.script.number}: {self.script.title}"
            self._show(Rule(heading, characters="═", align="left"), Text(), Markdown(_below_title(self.script)))
            if first > 1:
                self._run_unseen(first - 1)
            number = first
            while number <= len(self.script.parts):
                self._keep(number)
                went_well = self._play_part(number)
                if not (went_well or session.interactive):
                    return False
                if not session.interactive or self._ask_what_next(went_well):
                    number += 1
            self._keep(0)
        return True

    def _keep(self, number: int) -> None:
        """The part that the reader has reached; 0 is the end. A run into a pipe has no reader."""
        if self.session.interactive:
            self.session.progress.set_part(self.session.lesson, number)

    # --- parts -------------------------------------------------------------------------------------

    def _play_part(self, number: int) -> bool:
        """Show and run; False where an error ended it, which is shown."""
        parts = self.script.parts
        part = parts[number - 1]
        self.session.checked.clear()
        self._show(Text(), Rule(f"{number} of {len(parts)}: {part.title}", align="left"))
        for block in part.blocks:
            if block.kind == "prose":
                self._show(Text(), Markdown(block.text))
                continue
            code = block.text.replace("  # fmt: skip", "")  # said to the formatter, not to the reader
            self._show(
                Text(),
                Padding(Syntax(code, "python", theme="ansi_dark", word_wrap=True), (0, 0, 0, 2), expand=False),
                Text(),
            )
            self._screen.held = [] if self.session.interactive else None
            try:
                if not self._run(block):
                    return False
            finally:
                self._release()
                self._screen.held = None
        return True

    def _run(self, block: Block) -> bool:
        try:
            script.execute(block, self.script.path, self.namespace)
        except ClaimError as error:
            self.session.say(str(error), "bold red")
        except (Exception, SystemExit) as error:
            self.session.say(told(error), "red")
        else:
            return True
        return False

    def _run_unseen(self, count: int) -> None:
        """The parts before the one to go on with: their code makes what later parts use."""
        session = self.session
        session.say(f"From part {count + 1} on. The parts before it run again unseen; --part 1 begins anew.", "dim")
        session.interactive, interactive = False, session.interactive
        console, session.console = session.console, type(session.console)(file=StringIO())
        try:
            with redirect_stdout(StringIO()):
                went_well = all(
                    self._run(block)
                    for part in self.script.parts[:count]
                    for block in part.blocks
                    if block.kind == "code"
                )
        finally:
            session.interactive, session.console = interactive, console
        if not went_well:
            session.say("One of them stopped at an error: begin with --part 1.", "yellow")

    # --- the reader --------------------------------------------------------------------------------

    def _ask_what_next(self, went_well: bool) -> bool:
        """True: on to the next part. False: this one again, from the file as it is now. Raises Leave."""
        exercises = [self.session.exercises[name] for name in self.session.checked]
        open_ones = [exercise for exercise in exercises if exercise.verdict.state != "right"]
        while True:
            keys = ["Enter: this part again"] if not went_well else ["Enter: on", "r: this part again, from the file"]
            keys += ["h: hint"] if open_ones else []
            typed = self._wait("   ".join([*keys, "q: leave"]))
            if typed == "h" and open_ones:
                for exercise in open_ones:
                    self.session.say(f"hint for {exercise.name}: {exercise.hint}")
            elif typed == "" and went_well:
                return True
            elif typed in ("", "r") and self._read_again():
                return False

    def _read_again(self) -> bool:
        """Take the file as it was saved last. False, and an explanation, where it cannot be read."""
        linecache.checkcache()
        try:
            again = script.read(self.script.path)
        except (SyntaxError, ValueError, OSError) as error:
            self.session.say(told(error), "red")
            return False
        if len(again.parts) != len(self.script.parts):
            self.session.say("The file has other parts now; leave with q and start the lesson again.", "yellow")
            return False
        self.script = again
        return True

    def _wait(self, keys: str) -> str:
        """A line from the reader; the prompt is wiped off after it. Raises Leave at q and at the end of input."""
        plain = self.session.console.is_dumb_terminal
        forget_keys()
        typed = self.session.ask(f"[{keys}] " if plain else f"\x1b[2m[{keys}]\x1b[0m ")
        self._screen.rows = 0
        if typed is None or typed.lower() in ("q", "quit", "exit"):
            raise Leave
        if not plain:
            sys.stdout.write("\r\x1b[1A\x1b[2K")  # one row up, and empty it
        return typed.lower()

    # --- the screen --------------------------------------------------------------------------------

    def _show(self, *pictures: RenderableType) -> None:
        """Print, but let nothing scroll away unread: what does not fit any more waits for Enter."""
        console = self.session.console
        with console.capture() as captured:
            for picture in pictures:
                wide = isinstance(picture, (Padding, Rule))
                console.print(picture, width=console.width if wide else min(console.width, _PROSE))
        self._print(captured.get(), "more")

    def _print(self, text: str, what: str) -> None:
        full = 0 < self._screen.rows > self.session.console.height - 2 - text.count("\n")
        if self.session.interactive and full:
            self._wait(f"Enter: {what}")
        sys.stdout.write(text)

    def _release(self) -> None:
        """Print what a run printed so far, before the reader is asked, and at its end."""
        held = self._screen.held
        if held:
            text = "".join(held)
            held.clear()
            self._screen.held = None
            self._print(text, "what it prints")
            self._screen.held = held

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Rows are counted from here on, whoever prints them."""
        if not self.session.interactive:
            yield
            return
        self._screen = Screen(sys.stdout)
        self.session.before_ask = self._release
        with redirect_stdout(self._screen):
            yield


def watch(path: Path, make_session: Any) -> None:
    """Run the lesson again each time its file is saved, without asking; until Ctrl-C."""
    seen: float | None = None
    while True:
        try:
            changed: float | None = path.stat().st_mtime
        except OSError:  # an editor may take the file away for a moment
            changed = seen
        if changed == seen:
            time.sleep(0.2)
            continue
        seen = changed
        linecache.checkcache()
        session: Session = make_session()
        session.console.clear()
        run_quietly(path, session)
        session.say(f"{time.strftime('%H:%M:%S')}: {path.name} is run again when it is saved. Ctrl-C ends.", "dim")


def run_quietly(path: Path, session: Session) -> bool:
    """The whole lesson without its prose: what `python lessons/NN_name.py` prints. False: it stopped at an error."""
    try:
        player = Player(path, session)
    except (SyntaxError, ValueError) as error:
        session.say(told(error), "red")
        return False
    with running(session):
        return all(player._run(block) for part in player.script.parts for block in part.blocks if block.kind == "code")


def _below_title(lesson: Script) -> str:
    return lesson.head.partition("\n\n")[2].replace("\nTime:", "  \nTime:")


def told(error: BaseException) -> str:
    """An error of the lesson's code, without the frames of whoever ran it."""
    if isinstance(error, SyntaxError) or error.__traceback__ is None:
        lines = traceback.format_exception_only(error)
        return "".join(lines).rstrip() + "\nMend the line and save. What you did so far is kept."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HERE)]
    lines = ["Traceback, the last call at the end:\n", *traceback.format_list(frames[-6:])]
    return "".join([*lines, *traceback.format_exception_only(error)]).rstrip()
