"""Blocks as rows: number, reference count, owners, and the tokens in their slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from ....timeline.history import Moment
from ...common.canvas import DIM, NEW, WARM, Lines, brief, fit, line, rule, window
from ..scene import Scene, colour, owners

EMPTY = "_"  # a slot that was given out and holds nothing yet
UNKNOWN = "#"  # a slot that holds a token that the log does not name
WRITTEN = "▸"  # before a slot that this event gave out
MARKS = {  # what an event did to a block
    "+": "taken",
    "-": "given back",
    "↑": "one table more",
    "↓": "one table less",
    "C": "copy on write",
    "c": "cached now: in no table",
    "K": "known to the prefix cache from now on",
    "H": "found by the prefix cache",
    "E": "given up by the prefix cache, and taken",
}


def contents(moment: Moment, seq_id: int, index: int) -> list[str]:
    """The tokens in a logical block of a sequence, as they are shown."""
    size, place = moment.state.memory.block_size, moment.state.memory.sequences[seq_id]
    view = moment.state.sequences[seq_id]
    held = max(0, min(place.length - index * size, size))
    texts = [moment.history.text(t) for t in view.tokens[index * size : index * size + held]]
    return texts + [UNKNOWN] * (held - len(texts))


def block_texts(moment: Moment, block_id: int, in_tables: Sequence[int]) -> list[str]:
    """The tokens in a device block: of one of the tables that have it, or of the prefix cache."""
    if in_tables:
        longest = max(in_tables, key=lambda seq_id: moment.state.memory.sequences[seq_id].length)
        return contents(moment, longest, moment.state.memory.sequences[longest].blocks.index(block_id))
    known = moment.state.memory.known.get(block_id)
    if known is None or block_id not in moment.state.memory.cached:
        return []
    texts = [moment.history.text(t) for t in known.tokens]
    return texts or [UNKNOWN] * moment.state.memory.block_size


def written_in(moment: Moment, block_id: int, in_tables: Sequence[int]) -> set[int]:
    """Offsets of the slots of this block that the event gave out."""
    change, size = moment.change, moment.state.memory.block_size
    if not change.written or change.seq_ids[0] not in in_tables:
        return set()
    blocks = moment.state.memory.sequences[change.seq_ids[0]].blocks
    return {position % size for position in change.written if blocks[position // size] == block_id}


def slots(texts: Sequence[str], size: int, width: int, new: set[int], style: str = "", free: bool = False) -> Text:
    """The slots of a block in `width` cells: one cell for each, or its tokens as running text."""
    each = min(12, (width - 1) // size - 1)
    if each < 3 and size > 1:
        mark = WRITTEN if new else "│"
        number = "" if free else f"{len(texts)}/{size} "
        text = fit("".join(texts), width - 2 - len(number))
        return line((mark, NEW if new else DIM), (number, DIM), (text, style), ("│", DIM))
    row = Text()
    for offset in range(size):
        is_new = offset in new
        row.append(WRITTEN if is_new else "│", "bold" if is_new else DIM)
        if offset < len(texts):
            row.append(fit(texts[offset], each), f"{style} bold" if is_new else style)
        elif is_new:
            row.append(EMPTY * each, "bold")
        else:
            row.append((" " if free else EMPTY) * each, DIM)
    return row.append("│", DIM)


def mark_of(moment: Moment, block_id: int) -> str:
    """One letter or sign for what this event did to a device block; a space for nothing."""
    change, memory = moment.change, moment.state.memory
    if change.copied and block_id == change.copied[1]:
        return "C"
    if block_id in change.evicted:
        return "E"
    if block_id in change.known:
        return "K"
    if block_id in change.hits:
        return "H"
    if block_id not in change.before:
        return " "
    before, now = change.before[block_id], memory.ref_count[block_id]
    if not now:
        return "c" if block_id in memory.cached else "-"
    if not before:
        return "+"
    return "↑" if now > before else "↓"


def counted(now: int, before: int | None) -> str:
    """A reference count: `×2`, or `×1→×2` where the event changed it."""
    return f"×{now}" if before is None else f"×{before}→×{now}"


def names_of(moment: Moment, block_id: int, in_tables: Sequence[int], selected: int | None, width: int) -> str:
    """The sequences whose tables have the block. Where there is room, `A[2]`: entry 2 of the table of A, looked at."""
    names = [moment.history.name(seq_id) for seq_id in in_tables]
    linked = list(names)
    for i, seq_id in enumerate(in_tables):
        if seq_id == selected or (selected is None and seq_id in moment.change.seq_ids):
            linked[i] += f"[{moment.state.memory.sequences[seq_id].blocks.index(block_id)}]"
    return brief(linked if len(" ".join(linked)) <= width else names, width)


def block_row(scene: Scene, block_id: int, in_tables: Sequence[int], width: int) -> Text:
    """`+ 3 ×0→×1 A[2] │·brought│_______│...`: a device block in `width` cells."""
    moment, memory = scene.moment, scene.moment.state.memory
    number = len(str(memory.num_blocks - 1))
    mark = mark_of(moment, block_id)
    row = line((mark, NEW if mark != " " else ""), (f"{block_id:>{number + 1}} ", "bold" if mark != " " else ""))
    cached = block_id in memory.cached
    room = 10 if width < 60 else 14
    before = moment.change.before.get(block_id)
    count = counted(memory.ref_count[block_id], before)
    if not in_tables and not cached:
        row.append(fit(f"{count} free" if before else "free", room), DIM)
    elif cached:
        row.append(fit(f"{count} cached" if len(count) + 7 < room else "cached", room), WARM)
    else:
        row.append(f"{count} ", "bold" if before is not None else DIM)
        style = colour(moment, in_tables[0])
        names = names_of(moment, block_id, in_tables, scene.selected, room - len(count) - 1)
        row.append(names, f"{style} reverse" if scene.selected in in_tables else style)
        row.append(" " * (room - len(count) - 1 - len(names)))
    texts = block_texts(moment, block_id, in_tables)
    style = colour(moment, in_tables[0]) if in_tables else WARM if cached else DIM
    new, free = written_in(moment, block_id, in_tables), not in_tables and not cached
    return row.append_text(slots(texts, memory.block_size, width - row.cell_len, new, style, free))


def pool_title(moment: Moment) -> str:
    memory = moment.state.memory
    return f"Pool: {memory.num_blocks:,} × {memory.block_size} slots"


def overview(moment: Moment, owned: dict[int, list[int]], width: int, height: int, on_host: bool = False) -> list[Text]:
    """The whole pool as a map: a letter for each block, or a shade for each run of blocks.

    A letter is the request's; a digit says how many tables share the block, `c` is cached, `.` is free. In a run,
    the shade is the share in use, and `*` says that something changed there.
    """
    memory = moment.state.memory
    total = memory.num_host_blocks if on_host else memory.num_blocks
    each = max(1, -(-total // (width * height)))  # blocks in one cell
    changed = set() if on_host else set(moment.change.before) | set(moment.change.known)
    rows = []
    for top in range(0, total, width * each):
        row = Text()
        for first in range(top, min(top + width * each, total), each):
            blocks = range(first, min(first + each, total))
            style = "reverse" if changed and not changed.isdisjoint(blocks) else ""
            if each == 1:
                letter, of_block = _letter(moment, first, owned.get(first, ()), on_host)
                row.append(letter, f"{of_block} {style}".strip())
            else:
                used = sum(block in owned or (not on_host and block in memory.cached) for block in blocks)
                shade = " ░▒▓█"[-(-4 * used // each)]
                row.append("*" if style else shade, style)
        rows.append(row)
    return rows


def _letter(moment: Moment, block_id: int, in_tables: Sequence[int], on_host: bool) -> tuple[str, str]:
    if len(in_tables) > 1:
        return (str(len(in_tables)) if len(in_tables) < 10 else "+"), "bold"
    if in_tables:
        return moment.history.name(in_tables[0])[0], colour(moment, in_tables[0])
    return ("c", WARM) if not on_host and block_id in moment.state.memory.cached else (".", DIM)


BlockRow = Callable[[Scene, int, Sequence[int], int], Text]  # (scene, block, sequences that have it, width)


def pool_rows(scene: Scene, wanted: int, row: BlockRow, width: int, room: int, on_host: bool = False) -> Lines:
    """The row of each block; where there is no room, a map of all blocks, and the rows around `wanted`."""
    memory, owned = scene.moment.state.memory, owners(scene.moment, on_host)
    total = memory.num_host_blocks if on_host else memory.num_blocks
    if total <= room:
        return [row(scene, block_id, owned.get(block_id, ()), width) for block_id in range(total)]
    height = max(1, min(6, room // 3, -(-total // width)))
    first, last = window(total, room - height - 1, wanted + scene.scroll)
    each = -(-total // (width * height))
    title = f"{'Host blocks' if on_host else 'Blocks'} {first} to {last - 1}"
    return [
        *overview(scene.moment, owned, width, height, on_host),
        rule(title, width, "a letter for each block" if each == 1 else f"each mark is {each} blocks"),
        *(row(scene, block_id, owned.get(block_id, ()), width) for block_id in range(first, last)),
    ]
