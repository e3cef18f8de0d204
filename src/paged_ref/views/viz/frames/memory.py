"""Frame 5: where the memory went. The parts of MemoryUsage for each manager, now and over the whole run."""

from __future__ import annotations

from dataclasses import fields

from rich.text import Text

from ....core.memory.manager import MemoryUsage
from ....timeline.history import History
from ...common.canvas import DIM, Lines, Scene, line, pack, rule

# part, mark, style, what it is. The marks differ without colour.
PARTS = (
    ("tokens", "█", "green", "hold tokens in use"),
    ("reserved", "▒", "cyan", "reserved, used later"),
    ("internal", "!", "red", "wasted inside"),
    ("external", "x", "bright_red", "wasted between"),
    ("cached", "c", "yellow", "known, in no table"),
    ("free", "·", "dim", "free"),
)


def draw(scene: Scene, width: int, height: int) -> Lines:
    runs = list(scene.runs) or [scene.history]
    legend = _legend(width)
    room = height - len(legend)
    shown = runs[: max(1, room // 3)]
    # Three lines for each; a chart for all where there is room, else for this one.
    spare = room - 3 * len(shown)
    rows: Lines = []
    for run in shown:
        share = spare // len(shown) if spare >= 4 * len(shown) else spare if run is scene.history else 0
        rows += _run(scene, run, width, min(share, 10))
    return [*rows[:room], *[line("")] * (room - len(rows)), *legend]


def _run(scene: Scene, run: History, width: int, chart: int) -> Lines:
    """One manager: a heading, the pool now as a bar with its numbers, and the run as a chart below."""
    here = run is scene.history
    step = min(scene.moment.step, len(run.steps) - 1)
    when = f"step {step}" if step >= 0 else "before step 0"
    if here:
        usage = scene.moment.usage
    elif step < 0:
        usage = MemoryUsage(0, 0, 0, 0, 0, total_slots(run))
    else:
        usage = run.usage_of_step(step)
        when = when if step == scene.moment.step else f"at its end, {when}"
    title = f"{'▶ ' if here else ''}{manager_of(run)}: {usage.total:,} slots, {when}"
    return [
        rule(title, width, f"{len(run.steps)} steps in all"),
        bar(usage, width),
        _numbers(usage, width),
        *_chart(run, step, width, chart),
    ]


def bar(usage: MemoryUsage, width: int) -> Text:
    """The pool in one line: each part as long as its share."""
    row, done, cells = line(" "), 0, 0
    room = width - 2
    for part, mark, style, _ in PARTS:
        done += getattr(usage, part)
        upto = round(room * done / usage.total)
        row.append(mark * (upto - cells), style)
        cells = upto
    return row


def _numbers(usage: MemoryUsage, width: int) -> Text:
    row = line(" ")
    for part, mark, style, what in PARTS:
        number = getattr(usage, part)
        if number:
            row.append(f"{mark} ", style)
            row.append(f"{100 * number / usage.total:.0f} % {part if width < 120 else what}  ")
    if usage.shared:
        row.append(f"+ sharing saves {usage.shared} slots", "bold")
    return row


def _chart(run: History, now: int, width: int, height: int) -> Lines:
    """Steps from left to right, the pool from the bottom up; the step of this moment stands on a mark."""
    if height < 2 or not run.steps:
        return []
    height -= 1  # the line of the mark
    room = width - 2
    per_cell = max(1, -(-len(run.steps) // room))
    wide = max(1, min(3, room // len(run.steps)))
    columns = []
    for first in range(0, len(run.steps), per_cell):
        usage = run.usage_of_step(min(first + per_cell // 2, len(run.steps) - 1))
        column: list[tuple[str, str]] = []
        done = 0
        for part, mark, style, _ in PARTS:
            upto = round(height * (done + getattr(usage, part)) / usage.total)
            column += [(mark, style)] * (upto - len(column))
            done += getattr(usage, part)
        columns.append(column)
    rows = []
    for level in reversed(range(height)):
        row = line(" ")
        for column in columns:
            mark, style = column[level]
            row.append(mark * wide, style)
        rows.append(row)
    here = max(0, now) // per_cell * wide
    rows.append(line((" " + " " * here + "▲" * wide, "bold"), (f" step {now}" if now >= 0 else " before step 0", DIM)))
    return rows


def _legend(width: int) -> Lines:
    pieces = [f"{mark} {what}" for _, mark, _, what in PARTS]
    return [rule("Marks", width), *(line(" ", row) for row in pack(pieces, width - 2))]


def manager_of(run: History) -> str:
    return str(getattr(run.events[0], "manager", ""))


def total_slots(run: History) -> int:
    opened = run.events[0]
    return int(getattr(opened, "num_blocks", 0)) * int(getattr(opened, "block_size", 1))


assert [part for part, *_ in PARTS] == [field.name for field in fields(MemoryUsage)][: len(PARTS)]
