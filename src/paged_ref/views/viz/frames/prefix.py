"""Frame 4: the prefix cache. Which blocks the cache knows, how their digests form chains, what goes first."""

from __future__ import annotations

from itertools import islice

from rich.text import Text

from ....core.checks import plural
from ....timeline.history import Moment
from ....timeline.memory_state import KnownBlock
from ...common.canvas import DIM, NEW, WARM, Lines, brief, exactly, filled, fit, line, listing, rule, window, wrap
from ...common.trees import forest
from ..scene import Scene, colour, owners
from .blocks import UNKNOWN, mark_of, slots


def draw(scene: Scene, width: int, height: int) -> Lines:
    moment = scene.moment
    if not moment.history.caches:
        return _without(scene, width)
    memory, totals = moment.state.memory, moment.state.totals
    chains = chain(list(memory.known.values()))
    share = f" ({100 * totals.hits / totals.asked:.0f} %)" if totals.asked else ""
    so_far = f"{totals.hits} of {plural(totals.asked, 'token')} were found{share}; "
    so_far += f"{plural(totals.evicted, 'block')} given up for new tokens."
    tail = [
        rule("Hits and evictions so far", width),
        *(line(f" {row}") for row in wrap(so_far, width - 2)),
        listing(" Cached, oldest first:", islice(memory.cached, width), width, len(memory.cached)),
    ]
    if height > 20:
        holds = " A digest holds its parent's: the same tokens after another beginning are another block."
        tail.append(line((holds, DIM)))
    room = height - 1 - len(tail)
    marked = (i for i, (_, known) in enumerate(chains) if mark_of(moment, known.block_id) != " ")
    first, last = window(len(chains), room, next(marked, 0) + scene.scroll)
    note = f"{len(memory.known):,} known: {len(memory.cached):,} cached, the others in use"
    deepest = min(width // 4, max((len(strokes) for strokes, _ in chains[first:last]), default=0))
    owned = owners(moment)
    ranks = {block: rank for rank, block in enumerate(memory.cached, start=1)}
    rows = []
    for strokes, known in chains[first:last]:
        in_tables, rank = owned.get(known.block_id, []), ranks.get(known.block_id, 0)
        rows.append(_row(moment, strokes, known, deepest, width, in_tables, rank))
    if not rows:
        rows = [line((" Nothing yet. A block is known once it is full and its K and V are computed.", DIM))]
    return [rule("Known blocks, by their digests", width, note), *filled(rows, room), *tail]


def chain(known: list[KnownBlock]) -> list[tuple[str, KnownBlock]]:
    """The blocks as a forest: the strokes before each, and the block. A child follows its parent."""
    by_digest = {block.digest: block for block in known}
    children: dict[str, list[KnownBlock]] = {}
    roots = []
    for block in known:
        if block.parent in by_digest:
            children.setdefault(block.parent, []).append(block)
        else:
            roots.append(block)
    return forest(roots, lambda block: children.get(block.digest, []), indent_only_child=True)


def _row(
    moment: Moment, strokes: str, known: KnownBlock, indent: int, width: int, in_tables: list[int], rank: int
) -> Text:
    block = known.block_id
    mark = mark_of(moment, block)
    style = colour(moment, in_tables[0]) if in_tables else WARM
    owners_width = 16 if width < 100 else 24
    number = len(str(moment.state.memory.num_blocks - 1))
    row = line((mark, NEW if mark != " " else ""), (f" {strokes}", DIM), (known.digest[:6], "bold"))
    row = exactly(row, 2 + indent + 6)
    row.append(f" {block:>{number}} ")
    texts = [moment.history.text(t) for t in known.tokens] or [UNKNOWN] * moment.state.memory.block_size
    row.append_text(slots(texts, moment.state.memory.block_size, width - row.cell_len - owners_width - 1, set(), style))
    names = [moment.history.name(s) for s in in_tables]
    state = f"×{len(in_tables)} {brief(names, owners_width - 4)}" if in_tables else f"cached, goes {ordinal(rank)}"
    state = state if len(state) <= owners_width else f"goes {ordinal(rank)}"
    row.append(" " * max(1, width - owners_width - row.cell_len))
    row.append(fit(state, owners_width), f"{style} bold" if in_tables else style)
    return row


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _without(scene: Scene, width: int) -> Lines:
    manager = scene.moment.state.memory.manager
    why = " This run has none: it is off, or no block was ever full. generate --prefix-cache switches it on."
    if manager != "paged":
        why = (
            f" The {manager} manager has none: a region cannot be shared, so no other sequence could use what is in it."
        )
    return [rule("Prefix cache", width), *(line(" " + row) for row in wrap(why, width - 2))]
