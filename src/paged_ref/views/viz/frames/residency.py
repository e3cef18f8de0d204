"""Where each page is: a row for each layer and KV head, a cell for each block of tokens."""

from __future__ import annotations

from rich.text import Text

from ....timeline.history import Moment
from ...common.canvas import DIM, NEW, Lines, brief, fit, line, rule, window
from ..scene import Scene, colour

SIGNS = {"#": "on the device only", "=": "on both", ".": "on the host only"}
SHADES = " ░▒▓█"


def draw(scene: Scene, width: int, height: int) -> Lines:
    moment = scene.moment
    memory = moment.state.memory
    here = sum(device >= 0 for device, _ in memory.pages.places.values())
    away = sum(host >= 0 for _, host in memory.pages.places.values())
    note = f"{here:,} of {memory.num_blocks:,} on the device, {away:,} of {memory.num_host_blocks:,} on the host"
    rows: Lines = [rule("Pages", width, note)]
    seq_id = shown_sequence(scene)
    if seq_id is None:
        return [*rows, line((" no sequence has a page now", DIM))]
    tables = {(layer, head): pages for (s, layer, head), pages in sorted(memory.pages.tables.items()) if s == seq_id}
    longest = max(len(pages) for pages in tables.values())
    label = 10
    each = max(1, -(-longest // (width - label - 1)))  # blocks in one cell
    style = colour(moment, seq_id)
    rows.append(_about(moment, seq_id, longest, each, style))
    moved = set(getattr(moment.event, "pages", ()))
    keys = list(tables)
    changed = next((i for i, key in enumerate(keys) if moved & set(tables[key])), 0)
    first, last = window(len(keys), height - len(rows) - 1, changed + scene.scroll)
    for layer, head in keys[first:last]:
        row = line((f" L{layer:<3} h{head:<3} ", "bold"))
        for cell in range(0, len(tables[layer, head]), each):
            pages = tables[layer, head][cell : cell + each]
            row.append(sign(moment, pages), NEW if moved & set(pages) else style)
        rows.append(row)
    legend = [f"{mark} {what}" for mark, what in SIGNS.items()] if each == 1 else ["the darker, the more on the device"]
    others = sorted({s for s, _, _ in memory.pages.tables} - {seq_id})
    also = [f"also there: {brief([moment.history.name(s) for s in others], 20)}"] if others else []
    rows.append(line((" " + "   ".join([*legend, *also]), DIM)))
    return rows


def _about(moment: Moment, seq_id: int, longest: int, each: int, style: str) -> Text:
    size = moment.state.memory.block_size
    cells = f"a cell is {each} blocks" if each > 1 else f"a cell is a block of {size}"
    length = moment.state.memory.sequences[seq_id].length
    text = f": {length:,} tokens, {longest:,} blocks; {cells}"
    return line(" ", (moment.history.name(seq_id), f"{style} bold"), fit(text, 60).rstrip())


def shown_sequence(scene: Scene) -> int | None:
    """The one that was found, or that the event is about, or the first that has pages."""
    having = sorted({seq_id for seq_id, _, _ in scene.moment.state.memory.pages.tables})
    wanted = [scene.selected, *scene.moment.change.seq_ids]
    return next((seq_id for seq_id in wanted if seq_id in having), having[0] if having else None)


def sign(moment: Moment, pages: list[int]) -> str:
    """One cell: where the page is, or how many of several are on the device."""
    places = [moment.state.memory.pages.places.get(page, (-1, -1)) for page in pages]
    if len(places) == 1:
        device, host = places[0]
        return "." if device < 0 else "=" if host >= 0 else "#"
    here = sum(device >= 0 for device, _ in places)
    return SHADES[-(-4 * here // len(places))]
