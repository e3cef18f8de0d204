"""Frame 1: the block tables, and the pool that they point into."""

from __future__ import annotations

from itertools import islice

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ....core.checks import plural
from ....timeline.history import Moment
from ...common.canvas import DIM, NEW, WARM, Lines, beside, exactly, filled, fit, line, listing, rule, window
from ..scene import Scene, colour, in_order
from . import ranks
from .blocks import WRITTEN, block_row, pool_rows, pool_title


def draw(scene: Scene, width: int, height: int) -> Lines:
    """Tables on the left, the pool on the right, as in Figure 6 of the paper."""
    if not scene.moment.state.memory.paged:
        return _regions(scene, width, height)
    left = max(20, min(44, width // 3))
    right = width - left - 2
    pool = _pool if scene.history.ranks is None else ranks.draw
    return beside(_tables(scene, left, height), pool(scene, right, height), left, gap=2)


# --- left: the tables -------------------------------------------------------------------------------------


def _tables(scene: Scene, width: int, height: int) -> Lines:
    moment = scene.moment
    live = in_order(moment)
    looked_at = next((live.index(s) for s in (scene.selected, *moment.change.seq_ids) if s in live), 0)
    body = height - 1
    # A sequence takes a line at least, so these are enough to fill the window around the one looked at.
    begin = max(0, looked_at - body)
    near = live[begin : looked_at + body]
    groups = [_table(scene, seq_id, width) for seq_id in near]
    rows = [row for group in groups for row in group]
    heads = [sum(map(len, groups[:i])) for i in range(len(groups))]  # the row of each name
    if len(rows) <= body and len(near) == len(live):
        return [rule("Block tables", width), *(rows or [line((" no sequence", DIM))])]
    first, last = window(len(rows), body - 1, heads[looked_at - begin])
    left = len(live) - sum(first <= head < last for head in heads)
    more = f" … {left} more" if left else " … more entries"
    return [rule("Block tables", width, f"{len(live)} sequences"), *rows[first:last], line((more, "bold"))]


def _table(scene: Scene, seq_id: int, width: int) -> Lines:
    """A name, what it does, and its entries `logical→physical`."""
    moment = scene.moment
    view, place = moment.state.sequences[seq_id], moment.state.memory.sequences.get(seq_id)
    concerned = seq_id in moment.change.seq_ids
    style = colour(moment, seq_id)
    pointer = "▶" if seq_id == scene.selected else "*" if concerned else " "
    doing: str = view.status if view.status != "swapped" else "on the host"
    name = moment.history.name(seq_id)
    room = width - 2 - len(name)
    if place:
        tokens = f", {plural(place.length, 'token')}"
        doing += tokens if len(doing + tokens) <= room else f": {place.length}"
    rows = [line((pointer, "bold"), (name, f"{style} bold"), " ", fit(doing, room))]
    if place is None or not place.blocks:
        return rows
    new_entries = moment.change.new_entries if concerned else range(0)
    row = line("  ")
    written = moment.change.written if concerned and moment.change.seq_ids[0] == seq_id else range(0)
    last = (written[-1] // moment.state.memory.block_size,) if written else ()  # the entry of the newest token
    for entry, is_new in _entries(place.blocks, new_entries, last, "h" if place.on_host else ""):
        if row.cell_len + len(entry) + 1 > width and row.cell_len > 2:
            rows.append(row)
            row = line("  ")
        row.append(f"{entry}{'+' if is_new else ''} ", "bold" if is_new or entry[0] == WRITTEN else style)
    return [*rows, row]


def _entries(
    blocks: list[int], new_entries: range, written: tuple[int, ...], host: str
) -> list[tuple[str, bool]]:  # fmt: skip
    """`logical→physical` of a table, and whether it is new. In a long table, neighbours that run in step are one.

    The entry that the newest token is written through has the mark of the token's slot in the pool.
    """
    entries: list[tuple[str, bool]] = []
    run = 0  # entries in step before this one
    for logical, physical in enumerate(blocks):
        is_new = logical in new_entries
        follows = len(blocks) > 12 and logical > 0 and physical == blocks[logical - 1] + 1
        if follows and entries[-1][1] == is_new and logical not in written:
            run += 1
            entries[-1] = f"{logical - run}-{logical}→{host}{physical - run}-{physical}", is_new
        else:
            run = 0
            mark = WRITTEN if logical in written else ""
            entries.append((f"{mark}{logical}→{host}{physical}", is_new))
    return entries


# --- right: the pool --------------------------------------------------------------------------------------


def _pool(scene: Scene, width: int, height: int) -> Lines:
    moment, memory = scene.moment, scene.moment.state.memory
    used = memory.num_blocks - len(memory.free) - len(memory.cached)
    cached = f"{len(memory.cached):,} cached, " if memory.known else ""
    head = rule(pool_title(moment), width, f"{used:,} used, {cached}{len(memory.free):,} free")
    # The lists may be long; a screen never shows a hundred of them.
    tail = [listing("Free, next first:", memory.free[: -width - 1 : -1], width, len(memory.free))]
    if memory.known:
        tail.append(listing("Cached, oldest first:", islice(memory.cached, width), width, len(memory.cached)))
    concerned = [*moment.change.copied[1:], *moment.change.before, *moment.change.known]
    if not concerned and scene.selected in memory.sequences and not memory.sequences[scene.selected].on_host:
        concerned = memory.sequences[scene.selected].blocks
    return [head, *pool_rows(scene, min(concerned, default=0), block_row, width, height - 1 - len(tail)), *tail]


# --- managers without blocks ------------------------------------------------------------------------------


def _regions(scene: Scene, width: int, height: int) -> Lines:
    """Regions and holes in the order of their place, with their tokens; below them the slots as a map."""
    moment = scene.moment
    memory = moment.state.memory
    pieces = memory.pieces()
    note = f"{plural(len(pieces), 'piece')}, one for each sequence, in one array"
    head = rule(f"{memory.manager.capitalize()} manager: {memory.num_blocks:,} slots", width, note)
    waiting = [v for v in moment.state.sequences.values() if v.status in ("waiting", "swapped")]
    below = [
        listing(
            "Not on the device:",
            (f"{moment.history.name(v.seq_id)} ({'host' if v.status == 'swapped' else 'waits'})" for v in waiting),
            width,
        ),
        line(("Slots: a letter has a token, ░ given out and empty, . free", DIM)),
    ]
    map_height = max(1, min(-(-memory.num_blocks // width), height // 3))
    room = height - 1 - len(below) - map_height
    wanted = next((i for i, (_, _, s) in enumerate(pieces) if s in moment.change.seq_ids), 0) + scene.scroll
    each = 2 if 2 * len(pieces) <= room else 1  # lines for a piece
    first, last = window(len(pieces), room // each, wanted)
    rows = [row for piece in pieces[first:last] for row in _piece(scene, *piece, width)[:each]]
    return [head, *filled(rows, room), *below, *slot_map(moment, width, map_height)]


def _piece(scene: Scene, start: int, size: int, seq_id: int | None, width: int) -> Lines:
    moment = scene.moment
    where = f"{start}-{start + size - 1}"
    if seq_id is None:
        return [line(("  ", ""), (f"{where:>11} ", DIM), (f"free: a hole of {plural(size, 'slot')}", DIM)), line("")]
    place, view = moment.state.memory.sequences[seq_id], moment.state.sequences[seq_id]
    style = colour(moment, seq_id)
    mark = "▶" if seq_id == scene.selected else "*" if seq_id in moment.change.seq_ids else " "
    gauge_room = max(10, width - 48)
    full = round(gauge_room * place.length / size)
    head = line(
        (f"{mark} ", NEW if mark == "*" else "bold"),
        (f"{where:>11} ", "bold"),
        (f"{moment.history.name(seq_id):<4}", f"{style} bold"),
        (fit(f"{place.length} of {size} slots hold tokens", 30), ""),
        ("█" * full, style),
        ("░" * (gauge_room - full), DIM),
    )
    text = "│".join(map(moment.history.text, view.tokens[: place.length]))
    if cell_len(text) > width - 15:  # the newest are worth more
        text = "…" + set_cell_size(text[::-1], width - 16)[::-1]
    return [exactly(head, width), line(" " * 14, (text, style))]


def slot_map(moment: Moment, width: int, height: int) -> Lines:
    """All slots; a cell stands for the first of so many. A letter holds a token, ░ is given out and empty."""
    memory = moment.state.memory
    each = max(1, -(-memory.num_blocks // (width * height)))
    cells: list[tuple[str, str]] = [(".", DIM)] * -(-memory.num_blocks // each)
    for seq_id, place in memory.sequences.items():
        if not place.on_host:
            slots = (place.start, place.start + place.length, place.start + place.size)
            first, full, last = (-(-slot // each) for slot in slots)
            name, style = moment.history.name(seq_id)[0], colour(moment, seq_id)
            cells[first:last] = [(name, style)] * (full - first) + [("░", WARM)] * (last - full)
    return [Text.assemble(*cells[top : top + width]) for top in range(0, len(cells), width)]
