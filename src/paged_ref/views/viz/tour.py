"""The guided tour: the same requests under standard, swapping and paged memory, a minute of stops worth seeing.

Above each frame stands what the tour is about: in how many steps each manager came to the end, and how many sequences
ran together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rich.text import Text

from ...timeline.history import History
from ..common.canvas import filled, line, page, too_small, wrap
from ..common.printing import Size
from ..common.viewer import Viewer
from .frames.screen import FRAMES, SMALLEST, screen
from .scene import Scene

SPEED = 0.2  # stops in a second: twelve of them take a minute
HEAD = 3  # lines above the frame
SMALLEST_TOUR: Size = (SMALLEST[0], SMALLEST[1] + HEAD)
KEYS = "space pause, go on  ←→ another stop  q quit"
FRAME = {frame.name: number for number, frame in enumerate(FRAMES)}


@dataclass(frozen=True, slots=True)
class Stop:
    """A moment of a run, in the frame that shows it best."""

    run: int
    position: int
    frame: int
    words: str  # what there is to see


# Where a run is shown, in order: a mark of the log, `first` (its first full step) or `end`; the frame; what to see.
_PLACES = {
    "standard": (
        ("first", "tables", "Standard memory reserves a region for the whole life of a sequence, used or not."),
        ("crowd", "memory", "Requests wait, while much of the memory holds no token: reserved, internal or external."),
        ("end", "timeline", "Many dots: sequences that waited for a region, while others ran almost alone."),
    ),
    "swapping": (
        ("S", "swap", "Swapping reserves little, and moves a whole sequence to the host when a region cannot grow."),
        ("R", "swap", "It comes back when there is a hole that is large enough: each byte was copied twice."),
        ("end", "timeline", "More sequences run together; s is a sequence that waits on the host."),
    ),
    "paged": (
        ("first", "tables", "Paged memory hands out blocks, wherever they lie. A table says where each one is."),
        ("F", "sharing", "Two samples of one prompt: a fork copies nothing, both tables point to the same blocks."),
        ("C", "sharing", "One of them writes: only now is one block copied, the others stay shared."),
        ("S", "swap", "The pool is full, so the last to arrive makes room, block by block."),
        ("H", "prefix", "The same beginning once more: its blocks are still known, and are not computed again."),
        ("end", "timeline", "More sequences run together, so the same requests need the fewest steps."),
    ),
}


def stops(runs: Sequence[History]) -> list[Stop]:
    """The stops of these runs, one manager after another. A mark that a run lacks has no stop."""
    found = []
    for manager, places in _PLACES.items():
        for number, run in enumerate(runs):
            if run.opened.manager == manager:
                for where, frame, words in places:
                    if (position := _position(run, where)) is not None:
                        found.append(Stop(number, position, FRAME[frame], words))
    return found


def _position(run: History, where: str) -> int | None:
    if where == "end":
        return len(run) - 1
    if where == "first":
        return run.step_positions[1] - 1 if len(run.step_positions) > 1 else len(run) - 1
    if where == "crowd":  # the step in which most sequences wait
        crowded = max(range(len(run.plans)), key=lambda step: len(run.plans[step].waiting), default=None)
        return None if crowded is None else run.step_positions[crowded]
    return next((position for position, mark in run.marks if mark == where), None)


def headline(runs: Sequence[History]) -> str:
    """`standard 36 steps, 1.8 sequences together · swapping 27, 2.4 · paged 25, 2.6`: the steps, and the mean batch."""
    parts: list[str] = []
    for run in runs:
        together = mean([len(plan.chunks) for plan in run.plans] or [0])
        steps, sequences = ("", "") if parts else (" steps", " sequences together")
        parts.append(f"{run.opened.manager} {len(run.steps)}{steps}, {together:.1f}{sequences}")
    return " · ".join(parts)


class Tour(Viewer):
    """The stops, one after another, by itself or by keys."""

    thing = "stops"

    def __init__(self, runs: Sequence[History]) -> None:
        """Raises ValueError where there is nothing to see."""
        super().__init__(SPEED)
        self.runs, self.stops, self.playing = runs, stops(runs), True
        if not self.stops:
            raise ValueError("--tour: the log has no run under a standard, swapping or paged manager")

    @property
    def num_positions(self) -> int:
        return len(self.stops)

    def draw(self, width: int, height: int) -> Text:
        if (small := too_small(width, height, SMALLEST_TOUR)) is not None:
            return small
        stop = self.stops[self.position]
        message = self.message or f"stop {self.position + 1} of {len(self.stops)}  {KEYS}"
        seen = dict.fromkeys(each.run for each in self.stops[: self.position + 1])
        head = [line((f" {headline([self.runs[run] for run in seen])}", "bold reverse"))]
        head += [line((f" {row}", "bold")) for row in wrap(stop.words, width - 2)]
        scene = Scene(self.runs[stop.run].moment(stop.position), self.runs, message=message)
        frame = screen(scene, stop.frame, width, height - HEAD)
        return page([*filled(head, HEAD), *frame.split("\n")], width, height)

    def press_other(self, key: str) -> None:
        self.message = f"no such key; {KEYS}"

    def _help(self) -> None:
        self.message = KEYS

    actions = Viewer.actions | {"?": _help, "h": _help}
