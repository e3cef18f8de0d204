"""Frame 5: where the memory went. The parts of MemoryUsage for each manager, now and over the whole run."""

from __future__ import annotations

from rich.text import Text

from ....core.checks import plural
from ....core.memory.usage import MemoryUsage
from ....timeline.history import History
from ...common.bars import USAGE, amounts_of, bar, chart, column_width, legend, numbers
from ...common.canvas import DIM, Lines, filled, line, pack, rule, window
from ..scene import Scene


def draw(scene: Scene, width: int, height: int) -> Lines:
    runs = list(scene.runs) or [scene.history]
    marks = [rule("Marks", width), *(line(" ", row) for row in pack(legend(USAGE), width - 2))]
    room = height - len(marks)
    # Three lines for each: all, or as many as fit, this one among them.
    first, last = window(len(runs), len(runs) if 3 * len(runs) <= room else max(1, (room - 1) // 3), scene.run)
    shown = runs[first:last]
    # A chart for all where there is room, else for this one.
    spare = room - 3 * len(shown) - (len(shown) < len(runs))
    rows: Lines = []
    for run in shown:
        share = spare // len(shown) if spare >= 4 * len(shown) else spare if run is scene.history else 0
        rows += _run(scene, run, width, min(share, 10))
    if len(shown) < len(runs):
        rows.append(line((f" … {plural(len(runs) - len(shown), 'more run')}", "bold")))
    return [*filled(rows, room), *marks]


def _run(scene: Scene, run: History, width: int, chart_height: int) -> Lines:
    """One manager: a heading, the pool now as a bar with its numbers, and the run as a chart below."""
    here, opened = run is scene.history, run.opened
    step = min(scene.moment.step, len(run.steps) - 1)
    when = f"step {step}" if step >= 0 else "before step 0"
    if here:
        usage = scene.moment.usage
    elif step < 0:
        usage = MemoryUsage(0, 0, 0, 0, 0, opened.num_blocks * opened.block_size)
    else:
        usage = run.usage_of_step(step)
        when = when if step == scene.moment.step else f"at its end, {when}"
    saved = f"+ sharing saves {usage.shared} slots" if usage.shared else ""
    title = f"{'▶ ' if here else ''}{opened.manager}: {usage.total:,} slots, {when}"
    return [
        rule(title, width, f"{len(run.steps)} steps in all"),
        bar(amounts_of(usage), usage.total, width - 2),
        _numbers(usage, saved, width),
        *_chart(run, step, width, chart_height),
    ]


def _numbers(usage: MemoryUsage, saved: str, width: int) -> Text:
    """The parts in numbers: with their labels where there is room, else with their names."""
    for labels, shared in ((True, saved), (False, saved), (False, f"+{usage.shared} shared" if saved else "")):
        row = numbers(amounts_of(usage), usage.total, labels=labels).append(shared, "bold")
        if row.cell_len <= width:
            break
    return row


def _chart(run: History, now: int, width: int, height: int) -> Lines:
    """Steps from left to right, the pool from the bottom up; the step of this moment stands on a mark."""
    if height < 2 or not run.steps:
        return []
    height -= 1  # the line of the mark
    room = width - 2
    per_cell = max(1, -(-len(run.steps) // room))
    middles = [min(first + per_cell // 2, len(run.steps) - 1) for first in range(0, len(run.steps), per_cell)]
    columns = [amounts_of(run.usage_of_step(step)) for step in middles]
    wide = column_width(len(columns), room)
    rows = chart(columns, room, height)
    here = max(0, now) // per_cell * wide
    rows.append(line((" " + " " * here + "▲" * wide, "bold"), (f" step {now}" if now >= 0 else " before step 0", DIM)))
    return rows
