"""The attention of one query head: the mass of each page, which pages were chosen, and which were on the device."""

from __future__ import annotations

from ....timeline.events import PagesAttended
from ....timeline.history import Moment
from ...common.canvas import DIM, Lines, fit, line, rule
from ...common.program import program
from ...common.sparkline import sparkline
from ..scene import Scene, colour, prose
from .residency import shown_sequence


def draw(scene: Scene, width: int, height: int) -> Lines:
    moment = scene.moment
    event = _watched(scene)
    if event is None:
        advice = f" {program()} long --watch LAYER:HEAD --record FILE"
        nothing = " Nothing was watched up to here; n goes to the next time. What watches and records:"
        return [rule("Attention", width), line((nothing, DIM)), line((advice, DIM))]
    total, chosen = len(event.mass), len(event.chosen)
    covered = sum(event.mass[block] for block in event.chosen) / 1e6
    best = sum(sorted(event.mass, reverse=True)[:chosen]) / 1e6
    head = f"Layer {event.layer}, query head {event.head} of {moment.history.name(event.seq_id)}"
    cells = width - 11
    strips = max(1, min((height - 6) // 8, -(-total // cells)))
    each = max(1, -(-total // (cells * strips)))  # blocks in one cell
    rows: Lines = [
        rule(head, width, f"{total:,} pages"),
        line(f" Chosen: {chosen:,}, which hold {covered:.1%} of the attention; the best {chosen:,} hold {best:.1%}."),
        *_strips(moment, event, cells, each),
        rule("The pages with the most attention", width, f"a cell is {each} blocks" if each > 1 else ""),
    ]
    room = max(0, height - len(rows))
    first = max(0, min(scene.scroll, total - room))
    return [*rows, *_best_pages(moment, event, width, first, room)]


def _watched(scene: Scene) -> PagesAttended | None:
    """What this event says, or the last one that was about the sequence that is shown."""
    if isinstance(scene.moment.event, PagesAttended):
        return scene.moment.event
    seq_id = shown_sequence(scene)
    return None if seq_id is None else scene.moment.state.attended.get(seq_id)


def _strips(moment: Moment, event: PagesAttended, cells: int, each: int) -> Lines:
    """Three lines for each `cells * each` blocks: the mass, what was chosen, and what was on the device."""
    total, chosen, here = len(event.mass), set(event.chosen), set(event.resident)
    highest, style = max(max(event.mass), 1), colour(moment, event.seq_id)
    rows = []
    for begin in range(0, total, cells * each):
        firsts = range(begin, min(begin + cells * each, total), each)
        groups = [range(first, min(first + each, total)) for first in firsts]
        masses = [max(event.mass[block] for block in blocks) for blocks in groups]
        picked = "".join("^" if chosen & set(blocks) else " " for blocks in groups)
        device = "".join("#" if here & set(blocks) else "." for blocks in groups)
        rows += [
            line((f" {'mass':<9} ", "bold"), (sparkline(masses, cells, highest=highest, blank=True), style)),
            line((f" {'chosen':<9} ", "bold"), picked),
            line((f" {'device':<9} ", "bold"), (device, DIM)),
        ]
    return rows


def _best_pages(moment: Moment, event: PagesAttended, width: int, first: int, count: int) -> Lines:
    """A line for each of `count` pages, in the order of their attention from place `first` on."""
    chosen, here = set(event.chosen), set(event.resident)
    size, style = moment.state.memory.block_size, colour(moment, event.seq_id)
    tokens = moment.state.sequences[event.seq_id].tokens
    rows = []
    order = sorted(range(len(event.mass)), key=lambda block: -event.mass[block])
    for block in order[first : first + count]:
        text = prose(moment.history, tokens[block * size : (block + 1) * size])
        head = f" {'^' if block in chosen else ' '} {block:>6,} {event.mass[block] / 1e4:5.1f}% "
        where = "device " if block in here else "host   "
        head_style = "bold" if block in chosen else ""
        rows.append(line((head, head_style), (where, DIM), (fit(text, width - 26), style)))
    return rows
