"""Where the slots of a pool are, as a bar, as a chart over the steps, and in numbers.

PARTS is the one table of the parts of memory: their names, marks, colours and labels on every screen and plot.
`amounts` maps the name of each part to its slots or its share; the parts are drawn in the order of the mapping.
Each line begins with a space, which `cells` and `room` do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import NamedTuple

from rich.text import Text

from ...core.memory.usage import MemoryUsage
from .canvas import Lines, line


class MemoryPart(NamedTuple):
    """How one part of memory is drawn. Marks and shades differ without colour."""

    mark: str  # on screens
    shade: str  # in plots, where darker is fuller
    style: str  # colour in the terminal
    svg: str  # colour in SVG
    label: str


PARTS = {
    "tokens": MemoryPart("█", "█", "green4", "#1a7f37", "hold tokens"),
    "reserved": MemoryPart("▒", "▓", "turquoise4", "#d4a72c", "reserved, used later"),
    "internal": MemoryPart("!", "▒", "red1", "#cf222e", "internal, never used"),
    "external": MemoryPart("x", "░", "magenta3", "#8250df", "external, holes too small"),
    "cached": MemoryPart("c", "c", "deep_pink3", "#0969da", "cached, in no table"),
    "free": MemoryPart("·", "·", "dim", "#d0d7de", "free"),
    # Reserved or internal, while a run goes on: only its end shows which of both.
    "empty": MemoryPart("▒", "▓", "turquoise4", "#d4a72c", "allocated, empty"),
}
USAGE = tuple(field.name for field in fields(MemoryUsage) if field.name != "shared")  # these sum to the pool


def amounts_of(usage: MemoryUsage) -> dict[str, int]:
    """The slots of each part of the pool."""
    return {part: getattr(usage, part) for part in USAGE}


def lengths(amounts: Iterable[float], total: float, cells: int) -> list[int]:
    """How many of `cells` each amount takes of a bar that stands for `total`. The rounding errors do not add up."""
    done, ends = 0.0, [0]
    for amount in amounts:
        done += amount
        ends.append(round(cells * done / (total or 1)))
    return [end - start for start, end in pairwise(ends)]


def bar(amounts: Mapping[str, float], total: float, cells: int, *, shaded: bool = False) -> Text:
    """One line of `cells` cells for `total`; each part as long as its share, in marks or in shades."""
    row = line(" ")
    for part, length in zip(amounts, lengths(amounts.values(), total, cells), strict=True):
        row.append((PARTS[part].shade if shaded else PARTS[part].mark) * length, PARTS[part].style)
    return row


def chart(columns: Sequence[Mapping[str, float]], room: int, height: int) -> Lines:
    """A column for each mapping, the pool from the bottom up, in `height` lines of at most `room` cells."""
    wide = column_width(len(columns), room)
    stacks = [
        [part for part, length in zip(column, lengths(column.values(), sum(column.values()), height), strict=True)
         for _ in range(length)]
        for column in columns
    ]  # fmt: skip
    rows = []
    for level in reversed(range(height)):
        parts = (PARTS[stack[level]] for stack in stacks)
        rows.append(line(" ", *((part.mark * wide, part.style) for part in parts)))
    return rows


def column_width(num_columns: int, room: int) -> int:
    """Cells of each column of a chart: up to three, where so many columns fit."""
    return max(1, min(3, room // num_columns))


def numbers(amounts: Mapping[str, float], total: float, *, labels: bool = False, zeros: bool = False) -> Text:
    """The share of each part in percent, with its name or its label; `zeros`: of empty parts, too."""
    row = line(" ")
    for part, amount in amounts.items():
        if amount or zeros:
            row.append(f"{PARTS[part].mark} ", PARTS[part].style)
            row.append(f"{100 * amount / (total or 1):.0f} % {PARTS[part].label if labels else part}  ")
    return row


def legend(parts: Iterable[str]) -> list[str]:
    """The mark and the label of each part."""
    return [f"{PARTS[part].mark} {PARTS[part].label}" for part in parts]
