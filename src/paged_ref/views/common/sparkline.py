"""Numbers as one row of bars, an eighth of a cell high at least."""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, *, highest: float | None = None, blank: bool = False) -> str:
    """The last `width` values. `highest` (default: of all values) is as high as a cell.

    `blank` leaves a cell empty for a value of 0, so that every other value is visible beside it.
    """
    if width < 1 or not values:
        return ""
    top = (max(values) if highest is None else highest) or 1
    if blank:
        levels = " " + LEVELS
        return "".join(levels[-int(-len(LEVELS) * value // top)] for value in values[-width:])
    return "".join(LEVELS[min(len(LEVELS) - 1, int(len(LEVELS) * value / top))] for value in values[-width:])
