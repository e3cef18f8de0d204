"""The parts of a printed report: a heading, and a paragraph."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding


def print_heading(console: Console, title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/bold]", align="left", characters="─")


def print_paragraph(console: Console, text: str) -> None:
    """`text` in lines as wide as the console, one space from the left."""
    console.print(Padding(text, (0, 0, 0, 1)))
