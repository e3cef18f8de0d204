"""The plots of `paged-ref compare`, for the terminal and as pictures; the bars are those of `assess`, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.text import Text

from ..planner.steady import Steady
from ..planner.sweep import Curve
from ..views.common.plots import Bar, Line, bars_text, lines_text, round_up, svg

Y_MOST = 4.0  # times the lowest latency: how high the plot goes
ROWS = 17  # of the plot of latency
X_LABEL, Y_LABEL = "requests per second", "seconds per output token, mean"


def memory_plot(rows: Sequence[Curve], columns: int) -> Text:
    return bars_text(bars_of(row.steady for row in rows), columns)


def latency_plot(rows: Sequence[Curve], columns: int) -> Text:
    return lines_text(_lines(rows), columns, ROWS, _y_most(rows), X_LABEL, Y_LABEL, _bound(rows))


def picture(rows: Sequence[Curve]) -> str:
    """Both as SVG."""
    setup = rows[0].setup
    title = f"{setup.model.name} on {setup.gpu.name}: K/V memory while requests wait, and latency"
    bars = bars_of(row.steady for row in rows)
    return svg(title, bars, _lines(rows), _y_most(rows), X_LABEL, Y_LABEL, _bound(rows))


def _bound(rows: Sequence[Curve]) -> float | None:
    goodput = rows[0].goodput
    return goodput.limits.latency if goodput else None


def _y_most(rows: Sequence[Curve]) -> float:
    bound = _bound(rows)
    lowest = min(point.outcome.normalised.mean for row in rows for point in row.points)
    return round_up(max(Y_MOST * lowest, 1.25 * bound if bound else 0.0))


def bars_of(steadies: Iterable[Steady]) -> list[Bar]:
    """Where the memory is, while requests wait."""
    bars = []
    for steady in steadies:
        shares = asdict(steady.outcome.shares)
        shares["free"] += shares.pop("cached")
        bars.append(Bar(steady.setup.label, shares))
    return bars


def _lines(rows: Sequence[Curve]) -> list[Line]:
    return [
        Line(row.setup.label, [(point.rate, point.outcome.normalised.mean) for point in row.points]) for row in rows
    ]
