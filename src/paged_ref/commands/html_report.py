"""A report on one page of HTML that needs no other file: words, tables, pictures, and the command that makes it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from datetime import date
from html import escape

from rich.table import Table
from rich.text import Text

from ..extras.plain_text import plain
from ..planner.roofline import explain
from ..planner.setup import Setup
from ..planner.sweep import Served, memory_over_time
from ..planner.traces import RequestTrace
from ..views.common.plots import Line, svg
from ..views.common.program import SCRIPT
from .report_text import Code, Heading, OnPage, Part

_STYLE = """
body { font: 15px/1.45 ui-sans-serif, system-ui, sans-serif; color: #24292f; max-width: 60em; margin: 2em auto; }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse } th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #d0d7de }
th { font-weight: 600; vertical-align: bottom } .left { text-align: left }
pre { background: #f6f8fa; padding: 0.7em; white-space: pre-wrap; overflow-wrap: anywhere } svg { max-width: 100% }
@media print { body { margin: 0; font-size: 12px } h2 { break-after: avoid } svg, table { break-inside: avoid } }
"""


def _text(words: str) -> str:
    """Words as they may stand in a page: names and paths may hold characters that turn or hide what follows."""
    return escape(plain(words))


def page(title: str, base: Setup, parts: Iterable[Part]) -> str:
    """The whole page, with every number that it rests on."""
    head = f'<meta charset="utf-8">\n<title>{_text(title)}</title>\n<style>{_STYLE}</style>'
    every: list[Part] = [
        f"Made on {date.today()}.",
        *parts,
        Heading("Every number that this rests on"),
        sources(base),
        Heading("The command that makes this page again"),
        Code(shlex.join([SCRIPT, *sys.argv[1:]])),
    ]
    body = "\n".join([f"<h1>{_text(title)}</h1>", *map(_html, every)])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html(part: Part) -> str:
    match part:
        case str():
            return f"<p>{_text(part)}</p>"
        case Heading(words):
            return f"<h2>{_text(words)}</h2>"
        case Code(text):
            return f"<pre>{_text(text)}</pre>"
        case OnPage(make):
            return make()
        case Table():
            return _table(part)
        case _:
            return ""


def _table(printed: Table) -> str:
    """A printed table: the same cells."""

    def row(cells: Iterable[object], tag: str) -> str:
        parts = []
        for cell, column in zip(cells, printed.columns, strict=True):
            words = cell.plain if isinstance(cell, Text) else str(cell)
            words = _text(words.replace("-\n", "").replace("\n", " "))
            parts.append(f"<{tag}{' class=left' if column.justify == 'left' else ''}>{words}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    head = row([column.header for column in printed.columns], "th") if printed.show_header else ""
    body = [row(cells, "td") for cells in zip(*(column.cells for column in printed.columns), strict=True)]
    return "\n".join(["<table>", head, *body, "</table>"])


def memory_over_time_picture(served: Iterable[Served], trace: RequestTrace, rate: float) -> OnPage:
    """The share of the memory that holds tokens, over time, at this rate."""

    def make() -> str:
        lines = [Line(each.setup.label, memory_over_time(each.setup, trace, rate)) for each in served]
        title = f"Memory over time, {rate:.3g} requests per second"
        return svg(title, [], lines, 1.0, "seconds", "share of the memory for K and V that holds tokens", None)

    return OnPage(make)


def sources(base: Setup) -> Table:
    """Every number that the results rest on, and where it comes from."""
    gpu, model = base.gpu, base.model
    found = Table()
    for name in ("number", "value", "source"):
        found.add_column(name, justify="right" if name == "value" else "left")
    of_all = f" of {gpu.count}" if gpu.count > 1 else ""
    rows = [
        (f"memory{of_all}", f"{gpu.memory_bytes / 2**30:,.0f} GiB", gpu.source),
        (f"bandwidth{of_all}", f"{gpu.bandwidth / 1e9:,.0f} GB/s", gpu.source),
        (f"arithmetic{of_all}", f"{gpu.flops / 1e12:,.1f} TFLOPS", gpu.source),
        (f"link to the host{of_all}", f"{gpu.link / 1e9:,.0f} GB/s", gpu.source),
        *([("link between GPUs", f"{gpu.peer / 1e9:,.0f} GB/s", gpu.source)] if gpu.count > 1 else []),
        ("K and V of a token", f"{model.full_kv_bytes:,} bytes", f"{model.source}: {model.kv_arithmetic}"),
        ("weights", f"{model.num_parameters:,} x {model.weight_bits} bits", model.source),
        ("weights that a token meets", f"{model.num_active:,}", model.source),
        *((name, f"{value:g}", f"assumed: {why}") for name, value, why in explain(base.constants)),
    ]
    if gpu.price_per_hour is not None:
        rows.append((f"price of an hour{of_all}", f"{gpu.price_per_hour:g}", "the command line"))
    for each in rows:
        found.add_row(*each)
    return found
