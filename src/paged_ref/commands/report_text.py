"""The parts of a printed report: headings, paragraphs, tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..planner.roofline import Constants, explain
from ..views.common.console import Console
from ..views.common.program import SCRIPT, program

NARROWEST = 78  # columns: a narrower terminal wraps the lines, so that no number is cut


def wide_console() -> Console:
    """At least NARROWEST wide."""
    return Console(highlight=False, width=max(Console().width, NARROWEST))


def print_heading(console: Console, title: str) -> None:
    console.print()
    console.rule(Text(title, "bold"), align="left", characters="─")


def print_paragraph(console: Console, text: str) -> None:
    """`text` in lines as wide as the console, one space from the left. Commands in it can be pasted."""
    console.print(Padding(text.replace(f"{SCRIPT} ", f"{program()} "), (0, 0, 0, 1)))


def print_rows(console: Console, rows: Iterable[tuple[str, ...]]) -> None:
    """Aligned cells without rules."""
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*row)
    console.print(Padding(grid, (0, 0, 0, 1)))


def print_constants(console: Console, constants: Constants) -> None:
    print_rows(console, [(name, f"{value:g}", why) for name, value, why in explain(constants)])


def number_table(*columns: str, wrap_names: bool = False, **settings: Any) -> Table:
    """Names in the first column, and numbers in the others, which are never cut."""
    table = Table(box=box.SIMPLE_HEAD, **settings)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=bool(number) or not wrap_names)
    return table
