"""What keys do in every view: move through numbered positions, play, change the speed, show the help, quit.

A view knows no terminal: loop.py reads the keys and shows the screens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rich.cells import cell_len
from rich.text import Text

from .canvas import DIM, Lines, filled, line, pack, page, rule, wrap

Meanings = Sequence[tuple[str, str | Sequence[str]]]  # a key, mark or word, and what it means: a text, or items
Topic = Mapping[str, Meanings]  # by their titles
SPEEDS = (0.2, 0.5, 1, 2, 4, 8, 16, 32, 64)  # positions in a second


class Viewer(ABC):
    """A position from 0 to `num_positions` - 1. A subclass draws it, and adds its own keys to `actions`.

    Keys are characters, or names such as `left`, `pgup`, `enter`.
    """

    thing: ClassVar[str] = "positions"  # what the positions number
    help: ClassVar[Sequence[Topic]] = ()  # `?` turns their pages over; any other key leaves the help

    def __init__(self, speed: float) -> None:
        """`speed` is one of SPEEDS."""
        self.position = 0
        self.playing = False
        self.speed = SPEEDS.index(speed)
        self.helping = 0  # the page of the help that is shown, from 1; 0: none
        self._last_help = 1  # the last page, in the window as it was drawn
        self.message = ""  # what the last key has to say

    @property
    @abstractmethod
    def num_positions(self) -> int: ...

    @abstractmethod
    def draw(self, width: int, height: int) -> Text:
        """The screen, in exactly `width` x `height` cells."""

    def draw_help(self, width: int, height: int) -> Text:
        """The page of the help that is asked for, or the last that there is in this window."""
        pages = help_pages(self.help, width, height - 1)
        self._last_help = len(pages)
        self.helping = min(self.helping, len(pages))
        keys = "any key goes back" if self.helping == len(pages) else "?: the next page; any other key goes back"
        return page([*filled(pages[self.helping - 1], height - 1), line((f" {keys}", DIM))], width, height)

    def go(self, position: int) -> None:
        """To this position, or to the nearest that there is."""
        self.position = max(0, min(position, self.num_positions - 1))

    def tick(self) -> None:
        """While it plays: one position on. The last one ends it."""
        if self.playing:
            self.go(self.position + 1)
            self.playing = self.position + 1 < self.num_positions

    def press(self, key: str) -> bool:
        """Do what the key means; False: quit. Any key leaves the help."""
        self.message = ""
        if self.helping:
            self.helping = (self.helping + 1) % (self._last_help + 1) if key in ("?", "h") else 0
        elif key == "q":
            return False
        elif key in self.actions:
            self.actions[key](self)
        else:
            self.press_other(key)
        return True

    def press_other(self, key: str) -> None:  # noqa: B027  (most views have no other keys)
        """Do what a key means that is not in `actions`."""

    def _play(self) -> None:
        self.playing = not self.playing
        if self.playing and self.position + 1 == self.num_positions:
            self.go(0)

    def _change_speed(self, direction: int) -> None:
        self.speed = max(0, min(self.speed + direction, len(SPEEDS) - 1))
        self.message = f"{SPEEDS[self.speed]} {self.thing} in a second"

    def _help(self) -> None:
        self.helping = 1

    actions: ClassVar[dict[str, Callable[[Any], None]]] = {
        "right": lambda self: self.go(self.position + 1),
        "left": lambda self: self.go(self.position - 1),
        "home": lambda self: self.go(0),
        "end": lambda self: self.go(self.num_positions - 1),
        " ": _play,
        "+": lambda self: self._change_speed(1),
        "=": lambda self: self._change_speed(1),  # + without shift
        "-": lambda self: self._change_speed(-1),
        "?": _help,
        "h": _help,
    }


def help_pages(topics: Sequence[Topic], width: int, height: int) -> list[Lines]:
    """What each page of the help has in a window of this size: a topic that does not fit takes several pages."""
    found = []
    for topic in topics:
        lines = [row for title, meanings in topic.items() for row in (rule(title, width), *_meanings(meanings, width))]
        found += [lines[first : first + height] for first in range(0, len(lines), max(1, height))]
    return found


def _meanings(meanings: Meanings, width: int) -> Lines:
    """Keys, marks or words at the left, and what each means at their right."""
    left = max(10, 1 + max(len(word) for word, _ in meanings))
    lines = []
    for word, meaning in meanings:
        right = max(10, width - left - 1)
        if isinstance(meaning, str):
            rows = [meaning] if cell_len(meaning) <= right else wrap(meaning, right)
        else:
            rows = pack(meaning, right)
        lines += [line((f" {word if row is rows[0] else '':<{left}}", "bold"), row) for row in rows]
    return lines
