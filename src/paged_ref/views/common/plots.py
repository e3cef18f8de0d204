"""Plots: where memory goes and latency over the request rate, for a terminal and as SVG; a curve for a terminal.

Letters mark the lines and shades the shares, so that a pipe and a printer show them as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, log2, log10
from zlib import crc32

import numpy as np
from rich.text import Text

from ...extras.plain_text import plain
from .bars import PARTS, bar

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLOTTED = ("tokens", "reserved", "internal", "external", "free")  # parts of the memory
PALETTE = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#0a6e78", "#953800", "#57606a", "#bf3989", "#24292f")


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one line, by x."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bar:
    """Shares of one bar, keyed as PLOTTED; what is missing to 1 stays empty."""

    label: str
    shares: dict[str, float]


@dataclass(frozen=True, slots=True)
class Range:
    """A value, and the band that it is expected in; None: no bound at that side."""

    label: str
    value: float
    low: float | None
    high: float | None


def bars_text(bars: Sequence[Bar], columns: int) -> Text:
    """A bar a line, and the legend."""
    margin = max(len(each.label) for each in bars) + 3
    width = max(10, columns - margin - 1)
    text = Text()
    for each in bars:
        text.append(f" {each.label:<{margin - 2}}")
        text.append_text(bar({part: each.shares.get(part, 0.0) for part in PLOTTED}, 1, width, shaded=True))
        text.append("\n")
    text.append(" " * margin)
    for part in PLOTTED:
        text.append(PARTS[part].shade, PARTS[part].style).append(f" {part}  ")
    text.rstrip()
    return text


def lines_text(
    lines: Sequence[Line], columns: int, rows: int, y_most: float, x_label: str, y_label: str, bound: float | None
) -> Text:
    """Letters on a grid: A is the first line. What is above `y_most` is not drawn; `bound` is a dotted line."""
    margin = 7
    width = max(20, columns - margin - 1)
    x_most = _x_most(lines, y_most)
    grid = _letters(lines, width, rows, x_most, y_most, bound)
    text = Text(f" {y_label}\n")
    for number, cells in enumerate(grid):
        y = y_most * (rows - 1 - number) / (rows - 1)
        shown = f"{y:.3g}" if number % 4 == 0 or number == rows - 1 else ""
        text.append(f"{shown:>{margin - 1}}│{''.join(cells).rstrip()}\n")
    text.append(" " * (margin - 1) + "└" + "─" * width + "\n")
    middle, end = f"{x_most / 2:.3g}", f"{x_most:.3g}"
    axis = f"0{middle:^{width - 2}}"[: width - len(end)] + end
    text.append(" " * margin + axis + "\n" + " " * margin + x_label + "\n")
    for letter, line in zip(LETTERS, lines, strict=False):
        text.append(f"   {letter} {line.label}\n")
    text.rstrip()
    return text


def round_up(value: float) -> float:
    """The next number of which a quarter is round too: 1, 2, 4, 6 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return float(f"{next(step for step in (1, 2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9)) * power:.3g}")


def _x_most(lines: Sequence[Line], y_most: float) -> float:
    """Where the x axis ends: a round number after the last point that is drawn."""
    return round_up(max((x for line in lines for x, y in line.points if y <= y_most), default=1.0))


def _letters(
    lines: Sequence[Line], width: int, rows: int, x_most: float, y_most: float, bound: float | None
) -> list[list[str]]:
    """The cells of the grid, from the top row down. A letter does not cover the letter of an earlier line."""
    grid = [[" "] * width for _ in range(rows)]

    def place(x: float, y: float) -> tuple[int, int]:
        return rows - 1 - round(y / y_most * (rows - 1)), min(width - 1, round(x / x_most * (width - 1)))

    if bound is not None:
        grid[place(0, bound)[0]] = ["·"] * width
    for letter, line in zip(LETTERS, lines, strict=False):
        for (x0, y0), (x1, y1) in pairwise(line.points):
            for i in range(2 * width + 1):  # finely enough that a steep line has no gaps
                share = i / (2 * width)
                x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
                if y <= y_most:
                    row, column = place(x, y)
                    grid[row][column] = letter if grid[row][column] in " ·" else grid[row][column]
    return grid


# --- a curve -------------------------------------------------------------------------------------------

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a Braille pattern's 4 x 2
LABEL = 7  # columns of the number at the left


def curve(values: Sequence[float], width: int, height: int, unit: str = "") -> list[str]:
    """`height` lines of `width` columns: the highest value above, the lowest below, first to last across.

    Where there are more values than dots across, a dot is the mean of its share.
    """
    if not values:
        return []
    across = max(1, 2 * (width - LABEL - 2))  # dots
    shares = np.array_split(np.asarray(values, dtype=float), min(across, len(values)))
    means = np.array([share.mean() for share in shares])  # [dots across]
    lowest, highest = float(means.min()), float(means.max())
    rows = 4 * (height - 1)  # dots from top to bottom; the last line is the axis
    places = np.rint((highest - means) / ((highest - lowest) or 1) * (rows - 1)).astype(int)
    cells = np.zeros((height - 1, across // 2), dtype=int)
    for at in range(across):
        row = places[at * len(means) // across]
        cells[row // 4, min(at // 2, cells.shape[1] - 1)] |= DOTS[row % 4][at % 2]
    labels = [""] * (height - 1)
    labels[-1], labels[0] = f"{lowest:.3f}", f"{highest:.3f}"
    lines = [
        f"{label:>{LABEL}} ┤" + "".join(chr(0x2800 + int(cell)) for cell in row)
        for label, row in zip(labels, cells, strict=True)
    ]
    return [*lines, f"{unit:>{LABEL}} └" + "─" * (across // 2)]


# --- SVG -----------------------------------------------------------------------------------------------

WIDTH, LEFT, ROW = 760, 190, 26
_STYLE = "font-family: ui-sans-serif, system-ui, sans-serif; font-size: 13px; fill: #24292f"


def svg(
    title: str,
    bars: Sequence[Bar],
    lines: Sequence[Line],
    y_most: float,
    x_label: str,
    y_label: str,
    bound: float | None,
) -> str:
    """Both plots, or without bars the lines, in one picture, which fetches nothing."""
    parts = [_label(16, 26, title, "font-weight: 600; font-size: 15px"), *(_bars_svg(bars, 44) if bars else [])]
    top = 44 + (ROW * (len(bars) + 2) if bars else 0)
    parts += _lines_svg(lines, top, y_most, x_label, y_label, bound)
    height = top + 330 + 20 * -(-len(lines) // 3)
    return _picture(height, parts)


def _picture(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" style="{_STYLE}">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def ranges_svg(title: str, groups: Sequence[tuple[str, Sequence[Range]]], x_label: str) -> str:
    """A line for each value, with its band behind it, below the name of its group. The axis is from a quarter to 4,
    by doublings; what is beyond is drawn at its end."""
    parts = [_label(16, 26, title, "font-weight: 600; font-size: 15px")]
    left, width, y = 300, WIDTH - 320, 44

    def place(value: float) -> float:
        return left + width * (min(2.0, max(-2.0, log2(value) if value > 0 else -2.0)) + 2) / 4

    for name, ranges in groups:
        parts.append(_label(16, y + 14, name, "font-weight: 600"))
        y += ROW
        for each in ranges:
            low, high = (place(end if end is not None else 4 * side) for side, end in enumerate((each.low, each.high)))
            inside = low <= place(each.value) <= high
            parts += [
                _label(left - 12, y + 13, each.label, anchor="end"),
                f'<rect x="{low:.1f}" y="{y + 2}" width="{max(2, high - low):.1f}" height="14" fill="#d0d7de"/>',
                f'<circle cx="{place(each.value):.1f}" cy="{y + 9}" r="5" fill="{PALETTE[not inside]}"/>',
            ]
            y += ROW - 4
    for power in range(-2, 3):
        x = place(2.0**power)
        parts.append(f'<path d="M{x:.1f} 44V{y}" stroke="#57606a" stroke-dasharray="{"" if not power else "2 4"}"/>')
        parts.append(_label(x, y + 18, f"{2.0**power:g}", anchor="middle"))
    parts.append(_label(left + width / 2, y + 38, x_label, anchor="middle"))
    return _picture(y + 54, parts)


def _label(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(plain(words))}</text>'


def _bars_svg(bars: Sequence[Bar], top: float) -> list[str]:
    parts, width = [], WIDTH - LEFT - 20
    for number, each in enumerate(bars):
        y, x = top + ROW * number, float(LEFT)
        parts.append(_label(LEFT - 10, y + 14, each.label, anchor="end"))
        for part in PLOTTED:
            length = each.shares.get(part, 0.0) * width
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="18" fill="{PARTS[part].svg}"/>')
            x += length
    for number, part in enumerate(PLOTTED):
        x, y = LEFT + 105 * number, top + ROW * len(bars) + 4
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{PARTS[part].svg}"/>')
        parts.append(_label(x + 18, y + 11, part))
    return parts


def _lines_svg(
    lines: Sequence[Line], top: float, y_most: float, x_label: str, y_label: str, bound: float | None
) -> list[str]:
    left, width, height = 70, WIDTH - 100, 220
    x_most = _x_most(lines, y_most)
    bottom = top + 30 + height

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x_most * width, bottom - y / y_most * height

    clip = f"plot-{crc32(y_label.encode()):x}"  # a page may have several pictures, and an id counts in the whole page
    parts = [
        f'<clipPath id="{clip}"><rect x="{left}" y="{top + 30}" width="{width}" height="{height}"/></clipPath>',
        f'<path d="M{left} {top + 30}V{bottom}H{left + width}" fill="none" stroke="#57606a"/>',
        _label(left, top + 20, y_label),
        _label(left + width / 2, bottom + 38, x_label, anchor="middle"),
    ]
    for i in range(5):
        x, _ = place(x_most * i / 4, 0)
        _, y = place(0, y_most * i / 4)
        parts.append(_label(x, bottom + 18, f"{x_most * i / 4:.3g}", anchor="middle"))
        parts.append(_label(left - 8, y + 4, f"{y_most * i / 4:.3g}", anchor="end"))
    if bound is not None:
        _, y = place(0, bound)
        parts.append(f'<path d="M{left} {y:.1f}H{left + width}" stroke="#57606a" stroke-dasharray="4 4"/>')
    for number, line in enumerate(lines):
        colour = PALETTE[number % len(PALETTE)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        parts.append(
            f'<polyline points="{path}" clip-path="url(#{clip})" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        x, y = 20 + 245 * (number % 3), bottom + 66 + 20 * (number // 3)
        parts += [f'<rect x="{x}" y="{y - 9}" width="14" height="4" fill="{colour}"/>', _label(x + 20, y, line.label)]
    return parts
