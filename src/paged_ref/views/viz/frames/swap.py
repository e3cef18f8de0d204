"""Frame 3: preemption by swap. Device and host memory side by side, and what moved between them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from ....core.checks import plural
from ....timeline.events import RegionPlaced, RegionSwappedIn, RegionSwappedOut, SwappedIn, SwappedOut
from ...common.canvas import DIM, NEW, Lines, beside, brief, filled, fit, line, listing, rule, wrap
from ..scene import Scene, colour, kv_size, owners, prose
from .blocks import block_row, contents, pool_rows, slots


def draw(scene: Scene, width: int, height: int) -> Lines:
    below = _moved(scene, width)
    left = (width - 2) // 2
    room = height - len(below)
    if scene.moment.state.memory.paged:
        device, host = _device(scene, left, room), _host(scene, width - 2 - left, room)
    else:
        device, host = _regions(scene, left, room, False), _regions(scene, width - 2 - left, room, True)
    pools = beside(device[:room], host[:room], left, gap=2)
    return [*filled(pools, room), *below]


def _device(scene: Scene, width: int, height: int) -> Lines:
    moment, memory = scene.moment, scene.moment.state.memory
    head = rule("Device", width, f"{memory.num_blocks:,} blocks, {len(memory.free) + len(memory.cached):,} available")
    here = list(_sources_or_targets(scene, device=True)) or sorted(moment.change.before) or [0]
    return [head, *pool_rows(scene, here[0], block_row, width, height - 1)]


def _host(scene: Scene, width: int, height: int) -> Lines:
    memory, owned = scene.moment.state.memory, owners(scene.moment, on_host=True)
    if not memory.num_host_blocks:
        return [rule("Host", width), line((" no host memory: preemption is", DIM)), line((" by recompute", DIM))]
    head = rule("Host", width, f"{memory.num_host_blocks:,} blocks, {len(memory.host.free):,} free")
    here = list(_sources_or_targets(scene, device=False)) or sorted(owned) or [0]
    return [head, *pool_rows(scene, here[0], _host_row, width, height - 1, on_host=True)]


def _host_row(scene: Scene, block_id: int, in_tables: Sequence[int], width: int) -> Text:
    moment, memory = scene.moment, scene.moment.state.memory
    moved = block_id in _sources_or_targets(scene, device=False)
    mark = ("+" if isinstance(moment.event, SwappedOut) else "-") if moved else " "
    row = line((mark, NEW if moved else ""), (f" h{block_id:<3}", "bold" if moved else ""))
    if not in_tables:
        row.append(fit("free", 9), DIM)
        return row.append_text(slots([], memory.block_size, width - row.cell_len, set(), free=True))
    style = colour(moment, in_tables[0])
    names = brief([moment.history.name(s) for s in in_tables], 4)
    row.append(fit(f"×{memory.host.ref_count[block_id]}", 4), DIM)
    row.append(fit(names, 5), style)
    index = memory.sequences[in_tables[0]].blocks.index(block_id)
    texts = contents(moment, in_tables[0], index)
    return row.append_text(slots(texts, memory.block_size, width - row.cell_len, set(), style))


def _sources_or_targets(scene: Scene, device: bool) -> set[int]:
    """The blocks of one pool that this event moved from or to."""
    event = scene.moment.event
    if isinstance(event, (SwappedOut, SwappedIn)):
        side = 0 if isinstance(event, SwappedOut) == device else 1
        return {pair[side] for pair in event.blocks}
    return set()


def _moved(scene: Scene, width: int) -> Lines:
    """What went which way in this event, and in all."""
    moment, event, totals = scene.moment, scene.moment.event, scene.moment.state.totals
    row = "block" if moment.state.memory.paged else "slot"

    def cost(rows: int) -> str:
        return plural(rows, row) + (kv_size(moment.history, rows * moment.state.memory.block_size) if rows else "")

    rows = [line(" None in this event.")]
    title = "Moved between device and host"
    out = isinstance(event, (SwappedOut, RegionSwappedOut))
    if out or isinstance(event, (SwappedIn, RegionSwappedIn)):
        title = "Device → host in this event" if out else "Host → device in this event"
    if isinstance(event, (SwappedOut, SwappedIn)):
        pairs = [f"{a}→h{b}" if out else f"h{a}→{b}" for a, b in event.blocks]
        rows = [listing(f" {cost(len(pairs))}:", pairs, width)]
    elif isinstance(event, (RegionSwappedOut, RegionSwappedIn)):
        length = moment.state.memory.sequences[event.seq_id].length
        rows = [line(f" {cost(length)}: {moment.history.name(event.seq_id)}, now at slot {event.start}")]
    elif isinstance(event, RegionPlaced) and (before := moment.change.place_before) and before.start != event.start:
        title = "Moved on the device in this event"
        rows = [line(f" {cost(before.length)}: {moment.history.name(event.seq_id)}, now at slot {event.start}")]
    so_far = f"So far: {cost(totals.rows_out)} out; {cost(totals.rows_in)} back"
    if totals.rows_moved:
        so_far += f"; {cost(totals.rows_moved)} moved on the device"
    return [rule(title, width), *rows, *(line(f" {row}") for row in wrap(f"{so_far}.", width - 2))]


def _regions(scene: Scene, width: int, height: int, on_host: bool) -> Lines:
    """Regions and holes of one side, by place."""
    moment, memory = scene.moment, scene.moment.state.memory
    total = memory.num_host_blocks if on_host else memory.num_blocks
    name = "Host" if on_host else "Device"
    if not total:
        return [rule(name, width), line((" no host memory: this", DIM)), line((" manager does not swap", DIM))]
    note = f"{total:,} slots, {sum(size for _, size in memory.holes(on_host)):,} free"
    rows = [rule(name, width, note)]
    for start, size, seq_id in memory.pieces(on_host):
        where = f"{start}-{start + size - 1}"
        if seq_id is None:
            rows.append(line((f"  {where:>9}  free", DIM)))
            continue
        place, view = memory.sequences[seq_id], moment.state.sequences[seq_id]
        style = colour(moment, seq_id)
        mark = "*" if seq_id in moment.change.seq_ids else " "
        text = prose(moment.history, view.tokens[: place.length])
        head = f"{moment.history.name(seq_id):<4}{place.length}/{size} "
        room = width - 13 - len(head)
        rows.append(line((f"{mark} {where:>9}  ", "bold"), (head, f"{style} bold"), (fit(text, room), style)))
    return filled(rows, height)
