"""The attention of one query head: the mass of each page, which pages were chosen, and which were on the device."""

from __future__ import annotations

from ....timeline.events import PagesAttended
from ...common.canvas import DIM, Lines, Scene, colour, fit, line, rule
from ...common.sparkline import sparkline
from .residency import shown_sequence


def draw(scene: Scene, width: int, height: int) -> Lines:
    moment = scene.moment
    event = moment.event
    if not isinstance(event, PagesAttended):
        seq_id = shown_sequence(scene)
        latest = moment.state.attended.get(seq_id) if seq_id is not None else None
        if latest is None:
            return [
                rule("Attention", width),
                line(
                    (" nothing was watched up to here; `paged-ref long --watch LAYER:HEAD --record FILE` does it,", DIM)
                ),
                line((" and n goes to the next time", DIM)),
            ]
        event = latest
    total, chosen, here = len(event.mass), set(event.chosen), set(event.resident)
    covered = sum(event.mass[block] for block in chosen) / 1e6
    best = sum(sorted(event.mass, reverse=True)[: len(chosen)]) / 1e6
    style = colour(moment.history, moment, event.seq_id)
    rows: Lines = [
        rule(
            f"Layer {event.layer}, query head {event.head} of {moment.history.name(event.seq_id)}",
            width,
            f"{total:,} pages",
        ),
        line(
            f" Chosen: {len(chosen):,}, which hold {covered:.1%} of the attention; "
            f"the best {len(chosen):,} hold {best:.1%}."
        ),
    ]
    cells = width - 11
    strips = max(1, min((height - 6) // 8, -(-total // cells)))
    each = max(1, -(-total // (cells * strips)))  # blocks in one cell
    highest = max(max(event.mass), 1)
    for begin in range(0, total, cells * each):
        picked, device = "", ""
        masses = []
        for block in range(begin, min(begin + cells * each, total), each):
            blocks = range(block, min(block + each, total))
            masses.append(max(event.mass[b] for b in blocks))
            picked += "^" if chosen & set(blocks) else " "
            device += "#" if here & set(blocks) else "."
        rows += [
            line((f" {'mass':<9} ", "bold"), (sparkline(masses, cells, highest=highest, blank=True), style)),
            line((f" {'chosen':<9} ", "bold"), picked),
            line((f" {'device':<9} ", "bold"), (device, DIM)),
        ]
    rows.append(rule("The pages with the most attention", width, f"a cell is {each} blocks" if each > 1 else ""))
    order = sorted(range(total), key=lambda block: -event.mass[block])
    room = max(0, height - len(rows))
    first = max(0, min(scene.scroll, total - room))
    size = moment.state.memory.block_size
    tokens = moment.state.sequences[event.seq_id].tokens
    for block in order[first : first + room]:
        text = "".join(moment.history.text(t) for t in tokens[block * size : (block + 1) * size]).replace("·", " ")
        head = f" {'^' if block in chosen else ' '} {block:>6,} {event.mass[block] / 1e4:5.1f}% "
        where = "device " if block in here else "host   "
        rows.append(
            line((head, "bold" if block in chosen else ""), (where, DIM), (fit(text.strip(), width - 26), style))
        )
    return rows
