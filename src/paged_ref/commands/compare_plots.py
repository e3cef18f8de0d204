"""The two plots of `paged-ref compare`, for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.text import Text

from ..planner.comparison import ComparisonRow
from ..views.common.plots import Bar, Line, bars_text, lines_text, svg

Y_MOST = 2.0  # times the bound: how high the plot of latency goes
ROWS = 17  # of the plot of latency
X_LABEL, Y_LABEL = "requests per second", "seconds per output token, mean"


def memory_plot(rows: Sequence[ComparisonRow], columns: int) -> Text:
    return bars_text(_bars(rows), columns)


def latency_plot(rows: Sequence[ComparisonRow], columns: int) -> Text:
    bound = rows[0].curve.bound
    return lines_text(_lines(rows), columns, ROWS, Y_MOST * bound, X_LABEL, Y_LABEL, bound)


def picture(rows: Sequence[ComparisonRow]) -> str:
    """Both as SVG."""
    setup, bound = rows[0].curve.setup, rows[0].curve.bound
    title = f"{setup.model.name} on {setup.gpu.name}: K/V memory while requests wait, and latency"
    return svg(title, _bars(rows), _lines(rows), Y_MOST * bound, X_LABEL, Y_LABEL, bound)


def _bars(rows: Sequence[ComparisonRow]) -> list[Bar]:
    bars = []
    for row in rows:
        shares = asdict(row.curve.at_once.shares)
        shares["free"] += shares.pop("cached")
        bars.append(Bar(row.curve.setup.label, shares))
    return bars


def _lines(rows: Sequence[ComparisonRow]) -> list[Line]:
    return [
        Line(row.curve.setup.label, [(point.rate, point.outcome.normalised) for point in row.curve.points])
        for row in rows
    ]
