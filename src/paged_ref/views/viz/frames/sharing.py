"""Frame 2: fork and copy on write. Which tables share what, as a tree, and the copy when one is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.text import Text

from ....core.checks import plural
from ....timeline.events import SequenceForked
from ....timeline.history import Moment
from ...common.canvas import DIM, NEW, Lines, brief, exactly, filled, fit, line, listing, rule, window, wrap
from ...common.trees import forest
from ..scene import Scene, colour, kv_size, owners
from .blocks import block_texts, counted, mark_of, slots, written_in


@dataclass(slots=True)
class Node:
    """A block, and the blocks that follow it in one table or another."""

    block_id: int
    seq_ids: list[int] = field(default_factory=list)
    children: dict[int, Node] = field(default_factory=dict)


def draw(scene: Scene, width: int, height: int) -> Lines:
    moment = scene.moment
    if not moment.state.memory.paged:
        return _cannot_share(scene, width)
    below = _event(scene, width)
    owned = owners(moment)
    several = {block: seq_ids for block, seq_ids in owned.items() if len(seq_ids) > 1}
    size = moment.state.memory.block_size
    saved = sum(len(seq_ids) - 1 for seq_ids in several.values()) * size
    entries = sum(map(len, several.values()))
    now = "Nothing is shared now."
    if several:
        verb = "is" if len(several) == 1 else "are"
        now = f"{plural(len(several), 'block')} {verb} in {entries} places. "
        now += f"Sharing saves {plural(saved, 'slot')}{kv_size(scene.history, saved)}."
    rows = tree(moment)
    room = height - 2 - len(below)
    wanted = next((i for i, (_, node) in enumerate(rows) if mark_of(moment, node.block_id) != " "), 0) + scene.scroll
    first, last = window(len(rows), room, wanted)
    deepest = max((len(strokes) for strokes, _ in rows[first:last]), default=0)
    drawn = [_row(scene, *row, min(deepest, width // 3), width) for row in rows[first:last]]
    note = f"{first + 1}-{last} of {len(rows)} blocks" if len(rows) > room else "a branch is where they part"
    return [
        rule("Which sequences share which blocks", width, note),
        line(" ", (now, "bold")),
        *filled(drawn, room),
        *below,
    ]


def tree(moment: Moment) -> list[tuple[str, Node]]:
    """All tables on the device as one forest, those that share first: strokes and node of each row."""
    roots: dict[int, Node] = {}
    for seq_id, place in sorted(moment.state.memory.sequences.items()):
        level = roots
        for block_id in () if place.on_host else place.blocks:
            node = level.setdefault(block_id, Node(block_id))
            node.seq_ids.append(seq_id)
            level = node.children
    ordered = sorted(roots.values(), key=lambda node: (-len(node.seq_ids), node.seq_ids[0]))
    return forest(ordered, lambda node: list(node.children.values()), indent_only_child=False)


def _row(scene: Scene, strokes: str, node: Node, indent: int, width: int) -> Text:
    moment, memory = scene.moment, scene.moment.state.memory
    number = len(str(memory.num_blocks - 1))
    mark, before = mark_of(moment, node.block_id), moment.change.before.get(node.block_id)
    now = len(node.seq_ids)
    style = colour(moment, node.seq_ids[0])
    owners_width = max(8, min(20, width // 7))
    drawn = line((mark, NEW if mark != " " else ""), (f" {strokes}", DIM), (f"{node.block_id} ", "bold"))
    # Deeper trees than there is room for keep their slots in line, and lose their strokes.
    drawn = exactly(drawn, 2 + indent + number + 1)
    drawn.append(fit(counted(now, before), 6), "bold" if now > 1 or before is not None else DIM)
    texts = block_texts(moment, node.block_id, node.seq_ids)
    room = width - drawn.cell_len - owners_width - 1
    new = written_in(moment, node.block_id, node.seq_ids)
    drawn.append_text(slots(texts, memory.block_size, room, new, style))
    names = [moment.history.name(seq_id) for seq_id in node.seq_ids]
    drawn.append(" " * max(1, width - owners_width - drawn.cell_len))
    drawn.append(brief(names, owners_width), f"{style} {'reverse' if scene.selected in node.seq_ids else 'bold'}")
    return drawn


def _event(scene: Scene, width: int) -> Lines:
    """The copy or the fork of this event, or how many there were."""
    moment = scene.moment
    totals = moment.state.totals
    so_far = f"So far: {plural(totals.forks, 'fork')}, {plural(totals.copies, 'copy')} on write."
    if moment.change.copied:
        return _copy(scene, width)
    if isinstance(moment.event, SequenceForked):
        place = moment.state.memory.sequences[moment.event.child_id]
        parent, child = (moment.history.name(s) for s in (moment.event.parent_id, moment.event.child_id))
        table = [f"{i}→{block}" for i, block in enumerate(place.blocks)]
        return [
            rule("A fork in this event", width, so_far),
            listing(f"  {parent:<4}", table, width),
            listing(f"  {child:<4}", table, width - 34).append("   the same blocks, nothing copied"),
        ]
    return [rule("Fork and copy on write", width), line(f" None in this event. {so_far}")]


def _copy(scene: Scene, width: int) -> Lines:
    """Before and after, one above the other."""
    moment = scene.moment
    owned, size = owners(moment), moment.state.memory.block_size
    source, copy = moment.change.copied
    writer = moment.change.seq_ids[0]
    # What was copied is what lay there before the write: the slots in front of it.
    offset = moment.change.written.start % size
    cost = kv_size(moment.history, size)
    rows = [rule(f"A copy on write in this event: 1 block, {plural(offset, 'token')} in it{cost}", width)]
    for block, holders, what in ((source, owned.get(source, []), "stays as it is"), (copy, [writer], "is written")):
        names = brief([moment.history.name(s) for s in holders], 10)
        before, now = moment.change.before.get(block, 0), moment.state.memory.ref_count[block]
        head = line(f"  block {block:<5}{counted(now, before)}  ", (fit(names, 11), "bold"))
        style = colour(moment, holders[0]) if holders else ""
        room = width - head.cell_len - 16
        head.append_text(
            slots(block_texts(moment, block, holders), size, room, written_in(moment, block, holders), style)
        )
        head.append(f"  {what}")
        rows.append(head)
    rows.insert(2, line((" " * 9 + "↓ copied, so that the other tables see no change", "bold")))
    return rows


def _cannot_share(scene: Scene, width: int) -> Lines:
    """What it costs not to share: the prompt of several samples, held once for each."""
    moment = scene.moment
    manager = moment.state.memory.manager
    why = (
        f"None do. The {manager} manager gives each sequence a region of its own, and a region cannot be in two "
        "places. Each sample of a request holds the whole prompt once more."
    )
    rows = [rule("Which sequences share which blocks", width), *(line(f" {row}") for row in wrap(why, width - 2))]
    rows.append(line(""))
    head = len(rows)
    requests: dict[int, list[int]] = {}
    for seq_id in moment.state.memory.sequences:
        requests.setdefault(moment.state.sequences[seq_id].request_id, []).append(seq_id)
    for members in requests.values():
        if len(members) > 1:
            prompt = moment.state.sequences[members[0]].prompt_len
            held = sum(min(prompt, moment.state.memory.sequences[s].length) for s in members)
            names = brief([moment.history.name(s) for s in members], 24)
            rows.append(line(f" {names}: {held} slots for one prompt of {plural(prompt, 'token')}."))
    if len(rows) == head:
        rows.append(line((" No request has two samples in memory at this point.", DIM)))
    return rows
