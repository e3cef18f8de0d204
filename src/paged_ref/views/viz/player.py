"""The player: where the viewer is in a run, and what each key does. It knows no terminal (loop.py does)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from rich.text import Text

from ...timeline.events import sequences_of
from ...timeline.history import History, Moment
from ...timeline.marks import MARKS
from ..common.viewer import Viewer
from .frames.blocks import EMPTY, UNKNOWN, WRITTEN
from .frames.blocks import MARKS as SIGNS_OF_BLOCKS
from .frames.screen import Frame, frames_of, screen
from .scene import Scene

OPENINGS = "CSXHFA"  # marks of moments worth seeing first, the best first
HELP = (
    ("← →", "one event back, forward"),
    ("↑ ↓", "one step of the engine back, forward"),
    ("Home End", "to the beginning, to the end"),
    ("n p", "next, previous event of what this frame is about: forks, swaps …"),
    ("space", "play, pause;  + -  faster, slower"),
    ("1 … 6", "the frame, as the second line names them"),
    ("Tab", "the same step in the next run: another manager, the same requests"),
    ("/", "find a sequence (A, B2) and its next event;  / Enter: the one after"),
    ("PgUp PgDn", "scroll the list of the frame"),
    ("Esc", "let go of the sequence that was found"),
    ("? q", "this help, quit"),
)
SIGNS = (
    ("of a block", [f"{sign} {what}" for sign, what in SIGNS_OF_BLOCKS.items()]),
    ("in a block", [f"{WRITTEN} slot given out now", f"{EMPTY} empty slot", f"{UNKNOWN} token unknown to the log"]),
    ("of a name", ["* this event is about it", "▶ found with /"]),
    ("in tables", ["0→7 entry 0 is block 7", f"{WRITTEN}2→3 entry of the newest token", "2→3+ new entry"]),
    ("in the pool", ["A[2] entry 2 of the table of A", "×2→×1 tables that have the block: before, now"]),
    ("in the last line", [f"{mark} {what}" for mark, what in MARKS.items() if mark not in "BN"]),
)


def opening(run: History) -> int:
    """The moment that a viewer sees first: a copy on write, else a swap ..., else the first step."""
    for wanted in OPENINGS:
        for position, mark in run.marks:
            if mark == wanted:
                return position
    return run.step_positions[0] if run.step_positions else 0


class Player(Viewer):
    """Where the viewer is, and what each key does."""

    thing = "events"
    help = ({"Keys": HELP}, {"Signs": SIGNS})

    def __init__(self, runs: Sequence[History], frame: int = 0, position: int = 0) -> None:
        super().__init__(speed=2)
        self.runs = runs
        self.run = 0
        self.frame = frame
        self.selected: int | None = None
        self.scroll = 0
        self.typed: str | None = None  # after `/`
        self._last_find = ""
        self.go(position)

    @property
    def num_positions(self) -> int:
        return len(self.history)

    @property
    def history(self) -> History:
        return self.runs[self.run]

    @property
    def frames(self) -> tuple[Frame, ...]:
        return frames_of(self.history)

    def moment(self) -> Moment:
        return self.history.moment(self.position)

    def draw(self, width: int, height: int) -> Text:
        if self.helping:
            return self.draw_help(width, height)
        message = self.message
        if self.typed is not None:
            message = f"find a sequence: {self.typed}▏  (Enter: go, Esc: back)"
        scene = Scene(self.moment(), self.runs, self.selected, self.scroll, playing=self.playing, message=message)
        return screen(scene, self.frame, width, height)

    def press(self, key: str) -> bool:
        if self.typed is None:
            return super().press(key)
        self.message = ""
        self._type(key)
        return True

    def press_other(self, key: str) -> None:
        if key.isdigit() and 1 <= int(key) <= len(self.frames):
            self.frame, self.scroll = int(key) - 1, 0
        else:
            self.message = "no such key; ? lists the keys"

    # --- what keys do ------------------------------------------------------------------------------

    def _step(self, direction: int) -> None:
        """To the next StepPlanned, or to the one before."""
        steps = self.history.step_positions
        if direction > 0:
            i = bisect_right(steps, self.position)
            self.go(steps[i] if i < len(steps) else len(self.history))
        else:
            i = bisect_left(steps, self.position)
            self.go(steps[i - 1] if i else 0)

    def _mark(self, direction: int) -> None:
        about = self.frames[min(self.frame, len(self.frames) - 1)].about
        places = [position for position, mark in self.history.marks if mark in about]
        if direction > 0:
            found = next((p for p in places if p > self.position), None)
        else:
            found = next((p for p in reversed(places) if p < self.position), None)
        if found is None:
            self.message = f"nothing {'more' if direction > 0 else 'earlier'} of what this frame is about"
        else:
            self.go(found)

    def _next_run(self, direction: int = 1) -> None:
        step = self.moment().step
        self.run = (self.run + direction) % len(self.runs)
        steps = self.history.step_positions
        self.go(steps[min(step, len(steps) - 1)] if step >= 0 and steps else 0)
        if self.selected is not None and self.selected not in self.history.names:
            self.selected = None

    def _scroll(self, lines: int) -> None:
        self.scroll += lines

    def _escape(self) -> None:
        self.selected, self.scroll, self.playing = None, 0, False

    def _begin_find(self) -> None:
        self.typed, self.playing = "", False

    def _type(self, key: str) -> None:
        assert self.typed is not None
        if key == "escape":
            self.typed = None
        elif key == "enter":
            what, self.typed = self.typed or self._last_find, None
            self._find(what)
        elif key == "backspace":
            self.typed = self.typed[:-1]
        elif len(key) == 1:
            self.typed += key

    def _find(self, what: str) -> None:
        seq_id = self.history.find(what)
        if seq_id is None:
            known = ", ".join(list(self.history.names.values())[:12])
            self.message = f"no sequence {what!r} in this run; there are {known}"
            return
        self._last_find, self.selected, self.scroll = what, seq_id, 0
        events = self.history.events
        order = [*range(self.position + 1, len(events)), *range(self.position + 1)]
        found = next((p for p in order if seq_id in sequences_of(events[p])), self.position)
        self.go(found)
        self.message = f"{self.history.name(seq_id)}: its next event (/ Enter: again, Esc: let go)"

    actions = Viewer.actions | {
        "down": lambda self: self._step(1),
        "up": lambda self: self._step(-1),
        "n": lambda self: self._mark(1),
        "p": lambda self: self._mark(-1),
        "tab": _next_run,
        "shift tab": lambda self: self._next_run(-1),
        "pgdn": lambda self: self._scroll(4),
        "pgup": lambda self: self._scroll(-4),
        "/": _begin_find,
        "escape": _escape,
    }
