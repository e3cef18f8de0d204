"""The pools of a run whose model several ranks share: one column for each rank, beside the one table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from ....core.checks import plural
from ...common.canvas import DIM, NEW, WARM, Lines, brief, fit, line, listing, rule
from ..scene import Scene, colour
from .blocks import block_texts, mark_of, pool_rows, pool_title, slots, written_in

NARROWEST = 12  # cells of a column
OWNERS = 5


def draw(scene: Scene, width: int, height: int) -> Lines:
    """A row for each block number, and in it the block of each rank: the same tokens, K and V of other heads."""
    moment, ranks, memory = scene.moment, scene.history.ranks, scene.moment.state.memory
    assert ranks is not None
    before, shown, column = _columns(scene, width)
    names = [
        f"rank {rank}: {listed(ranks.heads[rank], 'head')}, {listed(ranks.kv_heads[rank], 'KV')}"
        for rank in range(shown)
    ]
    if max(map(len, names)) >= column:
        names = [f"rank {rank}" for rank in range(shown)]  # the first event says the heads
    hidden = len(ranks.heads) - shown
    note = f"{plural(hidden, 'rank')} more" if hidden else f"{len(memory.free):,} free"
    heads = line(" " * before, *((fit(name, column), "bold") for name in names))
    rows = [rule(f"{pool_title(moment)} on each rank", width, note), heads]
    tail = [listing("Free, next first:", memory.free[: -width - 1 : -1], width, len(memory.free))]
    concerned = [*moment.change.copied[1:], *moment.change.before, *moment.change.known]
    room = height - len(rows) - len(tail)
    return [*rows, *pool_rows(scene, min(concerned, default=0), _row, width, room), *tail]


def _columns(scene: Scene, width: int) -> tuple[int, int, int]:
    """The cells before the first column, how many ranks are shown, and the cells of the column of each."""
    assert scene.history.ranks is not None
    before = len(str(scene.moment.state.memory.num_blocks - 1)) + OWNERS + 4
    shown = max(1, min(len(scene.history.ranks.heads), (width - before) // NARROWEST))
    return before, shown, (width - before) // shown


def _row(scene: Scene, block_id: int, in_tables: Sequence[int], width: int) -> Text:
    """`+ 3 A     │·brought│ │·brought│ ...`"""
    moment, (before, columns, column) = scene.moment, _columns(scene, width)
    cached = block_id in moment.state.memory.cached
    mark = mark_of(moment, block_id)
    style = colour(moment, in_tables[0]) if in_tables else WARM if cached else DIM
    held_by = brief([moment.history.name(seq_id) for seq_id in in_tables], OWNERS) if in_tables else ""
    row = line(
        (mark, NEW if mark != " " else ""), (f"{block_id:>{before - OWNERS - 3}} ", "bold" if mark != " " else "")
    )
    row.append(fit(held_by or ("cache" if cached else "free"), OWNERS + 1), style)
    texts, new = block_texts(moment, block_id, in_tables), written_in(moment, block_id, in_tables)
    free = not in_tables and not cached
    for _ in range(columns):
        cell = slots(texts, moment.state.memory.block_size, column - 1, new, style, free)
        row.append_text(cell).append(" " * max(0, column - cell.cell_len))
    return row


def listed(part: tuple[int, int], what: str) -> str:
    """`heads 2-3`, `head 2`: from the first up to the one after the last."""
    first, last = part[0], part[1] - 1
    plural = "" if what == "KV" or first == last else "s"
    return f"{what}{plural} {first}" + (f"-{last}" if last > first else "")
