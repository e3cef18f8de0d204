"""Frames without keys: printed one after another into a pipe, or written as a picture."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.terminal_theme import TerminalTheme
from rich.text import Text

from .console import Console
from .files import write_text

Size = tuple[int, int]  # columns, rows


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue


# GitHub's light colours, for pictures that stand among text.
_GROUND = TerminalTheme(
    (255, 255, 255),
    (36, 41, 47),
    [_rgb(colour) for colour in ["24292f", "cf222e", "116329", "785000", "0969da", "8250df", "0a6e78", "57606a"]],
    [_rgb(colour) for colour in ["57606a", "a40e26", "1a7f37", "633c01", "218bff", "a475f9", "3192aa", "8c959f"]],
)


def is_terminal() -> bool:
    """Keys can be read, and screens shown."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def parse_size(text: str, smallest: Size) -> Size:
    """The value of `--size`. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if not found:
        raise ValueError(f"--size is {text!r}; columns x rows are needed, as in 100x30")
    width, height = int(found[1]), int(found[2])
    if width < smallest[0] or height < smallest[1]:
        raise ValueError(f"--size is {text}; at least {smallest[0]}x{smallest[1]} is needed")
    return width, height


def print_frames(
    draw: Callable[[int, int, int], Text], positions: Iterable[int], size: Size | None, smallest: Size
) -> None:
    """`draw(position, columns, rows)` at each position. Without a size: that of COLUMNS and LINES, or 80x24."""
    lines = os.environ.get("LINES", "")
    height = int(lines) if lines.isdigit() else 24
    width, height = size or (max(Console().width, smallest[0]), max(height, smallest[1]))
    console = Console(width=width, height=height)
    for i, position in enumerate(positions):
        if i:
            console.print()
        console.print(draw(position, width, height), no_wrap=True, overflow="crop", crop=True)


def write_svg(path: Path, frame: Text, size: Size, title: str) -> None:
    """A picture of one frame, which fetches nothing. Raises ValueError."""
    console = Console(
        width=size[0], height=size[1], record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(frame, no_wrap=True, overflow="crop", crop=True)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title, theme=_GROUND), flags=re.DOTALL)
    write_text(path, svg)
