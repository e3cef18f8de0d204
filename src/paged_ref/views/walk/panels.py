"""The panels of the kernel walk: lists of lines of a given width and height.

source     the kernel, the line of the moment marked ▶, the lines that the other kernel has otherwise ≠
caches     the slots: the sequence of each, which are read now, what the CUDA block has read so far
now        the access itself, in its array; the warp's load and its 32-byte sectors
counters   reads and writes of each thread
layouts    what the same warp load would move in the cache layouts of other systems
"""

from __future__ import annotations

from functools import cache

from pygments.token import Comment, Keyword, Number, String
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text

from ...interop.layouts import pack_size
from ..common.canvas import COLOURS, DIM, TITLE, Lines, exactly, fit, line, rule, window, wrap
from .run import LETTERS, IntArray, KernelRun, LayoutCost
from .source import SourceLines

NOW = "bold reverse"


# ---- the source


# Readable on a dark and on a light ground.
_STYLES = {Comment: "dim italic", Keyword: "bold", String: "dim", Number: "cyan"}
_THEME = ANSISyntaxTheme({kind: Style.parse(style) for kind, style in _STYLES.items()})


@cache
def _highlighted(code: SourceLines) -> dict[int, Text]:
    text = "\n".join(text for _, text in code.lines)
    painted = Syntax("", "python", theme=_THEME).highlight(text)
    return {number: row for (number, _), row in zip(code.lines, painted.split("\n", allow_blank=True), strict=False)}


def source(run: KernelRun, position: int, width: int, height: int, brief: bool = False, other: bool = True) -> Lines:
    """The kernel around the line of the moment.

    `brief` leaves comments at line ends out and halves indents; `other` shows what the other kernel has in
    place of a line.
    """
    current = int(run.line[position])
    painted = _highlighted(run.code)
    rows: Lines = []
    focus = 0
    for number, text in run.code.lines:
        here, different = number == current, number in run.code.different
        row = painted[number].copy()
        indent = len(text) - len(text.lstrip())
        pad = " " * (max(0, indent // 2 - 2) if brief else indent)
        if brief:
            cut = text.find("  # ", indent + 1)
            row = line(pad).append_text((row[:cut] if cut >= 0 else row)[indent:])
        head = line(("▶" if here else " ", TITLE), ("≠" if different else " ", TITLE), (f"{number:>3} ", DIM))
        row = exactly(head.append_text(row), width)
        if here:
            row.stylize(NOW)
            focus = len(rows)
        elif different:
            row.stylize("bold underline", 6)
        rows.append(row)
        if different and other:
            instead = run.code.different[number].strip()
            rows.append(exactly(line((f" ≠     {pad}{_OTHER[run.name]}: {instead}", "italic")), width))
    first, end = window(len(rows), height, focus)
    return rows[first:end]


_OTHER = {"naive": "paged", "paged": "naive"}


# ---- the cache


def cell_width(run: KernelRun) -> int:
    return 6 + len(str(max(run.sizes.tokens) - 1))


def _per_row(run: KernelRun, width: int) -> int:
    block_size, room = run.sizes.block_size, max(1, (width - 5) // cell_width(run))
    return -(-block_size // -(-block_size // room))  # as many in each line


def grid_height(run: KernelRun, width: int) -> int:
    """Lines that the whole cache takes."""
    return run.shape[0] * -(-run.sizes.block_size // _per_row(run, width))


_LEGEND = (
    "[A4] read now  (A4) by other lanes",
    "k K  some, all of its K was read",
    "v V  some, all of its V",
    "A_   A's, empty     .  free",
)


def caches(run: KernelRun, position: int, width: int, height: int) -> Lines:
    """The sequence of each slot, what is read now, and what the CUDA block has read so far."""
    block_size, per_row = run.sizes.block_size, _per_row(run, width)
    if run.name == "paged":
        head = f"K and V: {run.shape[0]} blocks of {block_size} slots"
    else:
        head = f"K and V: {run.num_slots} slots, by regions"
    load = run.load(position)
    now_slot, named = run.slot(position), run.slot_named(position)
    with_it = {slot for row in load.rows if (slot := run.slot(int(row))) is not None}
    read = {name: run.read_so_far(position, name) for name in ("keys", "values")}
    own_head = run.sizes.head_size  # a CUDA block reads the elements of one KV head
    rows: Lines = []
    focus = 0
    for block in range(run.shape[0]):
        for begin in range(0, block_size, per_row):
            first = block * block_size + begin
            label = f"b{block}" if run.name == "paged" else str(first)
            row = line((f"{label if not begin or run.name == 'naive' else '':>4} ", DIM))
            for slot in range(first, min(first + per_row, (block + 1) * block_size)):
                if slot == named:
                    focus = len(rows)
                row.append_text(_cell(run, slot, now_slot, with_it, read["keys"], read["values"], own_head))
            rows.append(row)
    top = [rule(head, width), _tables(run, position, width)]
    first, end = window(len(rows), height - len(top), focus)
    lines = [*top, *rows[first:end]]
    if height > len(lines) + len(_LEGEND):
        lines += [line(""), *(line(("  " + text, DIM)) for text in _LEGEND)]
    return lines


def _cell(
    run: KernelRun, slot: int, now_slot: int | None, with_it: set[int], keys: IntArray, values: IntArray, full: int
) -> Text:
    owner = run.owner.get(slot)
    digits = len(str(max(run.sizes.tokens) - 1))
    if owner is None:
        name, style = "." + " " * digits, DIM
    else:
        seq, held = owner
        name = LETTERS[seq] + (fit("_", digits) if held is None else f"{held:<{digits}}")
        style = COLOURS[seq % len(COLOURS)]
    marks = ""
    for letter, counts in (("k", keys), ("v", values)):
        seen = int(counts[slot])
        marks += " " if not seen else letter.upper() if seen >= full else letter
    open_, close = ("[", "]") if slot == now_slot else ("(", ")") if slot in with_it else (" ", " ")
    emphasis = f"{style} {NOW}" if slot == now_slot else f"{style} bold" if slot in with_it else style
    return line((f"{open_}{name}{close}", emphasis), (marks, "bold"), " ")


def _tables(run: KernelRun, position: int, width: int) -> Text:
    """The block tables (or the starts), the entry of the moment in brackets; this CUDA block's sequence first."""
    token = run.access(position).block[0]
    name = run.info(position).name
    slot = run.slot(position)
    row = line(("block_tables" if run.name == "paged" else "starts", TITLE))
    for seq in [token, *(s for s in range(len(run.tables)) if s != token)]:
        row.append(f"  {LETTERS[seq]}:", COLOURS[seq % len(COLOURS)] + (" bold" if seq == token else ""))
        for i, entry in enumerate(run.tables[seq]):
            looked_up = (
                seq == token
                and name in ("block_tables", "starts")
                and run.access(position).index[-1] == (i if run.name == "paged" else seq)
            )
            leads = seq == token and slot is not None and run.name == "paged" and slot // run.sizes.block_size == entry
            text = f"[{entry}]" if looked_up else f"({entry})" if leads else f" {entry}"
            row.append(text, NOW if looked_up else "bold" if leads else "")
    return exactly(row, width)


# ---- the access


def now(run: KernelRun, position: int, width: int) -> Lines:
    """The line in full, the access in its array, and the load of the warp: three lines."""
    access, info, number = run.access(position), run.info(position), int(run.line[position])
    where = f"{run.code.file}:{number}"
    own = int(run.trace.line[position])
    if own != number:
        where = f"addressing.py:{own}, called from {where}"
    code = run.code.text(number).strip().partition("  # ")[0]
    verb = "writes" if access.write else "reads"
    name = f"{info.name}[{', '.join(map(str, access.index))}]"
    first = line((f" {where}  ", DIM), (code, TITLE))
    sentence = f" thread {access.thread} {verb} {name}  "
    strip = _strip(run, position, max(4, width - len(sentence) - 2))
    second = line(sentence).append_text(strip)
    return [exactly(first, width), exactly(second, width), exactly(line(" " + _warp(run, position)), width)]


def _strip(run: KernelRun, position: int, width: int) -> Text:
    """The current row of the array, a mark for each element."""
    info, flat = run.info(position), int(run.trace.index[position])
    own, others = run.touched(position)
    same = run.trace.array == run.trace.array[position]
    used = int(run.trace.index[same].max()) + 1 if info.space == "shared" else info.shape[-1]  # shared: what is in use
    begin = flat - flat % info.shape[-1]
    first, end = window(used, width - 2, flat - begin)
    text = Text("…" if first else "")
    for i in range(begin + first, begin + end):
        if i == flat:
            text.append("▶", NOW)
        else:
            text.append("■" if i in own else "□" if i in others else "·", "" if i in own else DIM)
    return text.append("…" if end < used else "")


def _warp(run: KernelRun, position: int) -> str:
    load, info = run.load(position), run.info(position)
    lanes = f"{len(load.threads)} lane{'s' if len(load.threads) > 1 else ''}"
    verb = "store" if run.trace.write[position] else "load"
    if info.space != "global":
        return f"warp {load.threads[0] // 32}: {lanes} {verb} together, in shared memory: no sectors to move"
    moved = load.sectors * 32
    return (
        f"warp {load.threads[0] // 32}: {lanes} {verb} together: {load.bytes} bytes in {load.sectors} "
        f"sector{'s' if load.sectors > 1 else ''} of 32 bytes ({load.bytes / moved:.0%} used)"
    )


def thread_line(run: KernelRun, position: int, width: int) -> Lines:
    """The counters of one thread: a line for global memory, one for shared memory."""
    thread, counts = int(run.trace.thread[position]), run.counts(position)
    lines = []
    for space, head in (("global", f"thread {thread} so far, global:"), ("shared", "shared:")):
        parts = [
            f"{_SHORT.get(info.name, info.name)} {_both(each)}"
            for info, each in zip(run.trace.arrays, counts[:, thread], strict=True)
            if info.space == space and each.any()
        ]
        lines.append(exactly(line((f" {head:>24} ", TITLE), "  ".join(parts) or "nothing"), width))
    return lines


_SHORT = {"query_start_loc": "start_loc", "block_tables": "table"}


# ---- the counters


def _both(each: IntArray) -> str:
    """`12` reads, `3w` writes, `12+3w`."""
    reads, writes = int(each[0]), int(each[1])
    return "+".join(part for part in (str(reads) if reads else "", f"{writes}w" if writes else "") if part) or "."


def counters(run: KernelRun, position: int, width: int, height: int) -> Lines:
    """Reads and writes of each thread in each array, in this CUDA block up to now; `w` marks the writes."""
    title, rows = _counter_rows(run, position, height - 2)
    thread, num_threads, current = int(run.trace.thread[position]), run.trace.num_threads, run.info(position).name
    label = max(map(len, rows)) + 2
    cell = max(5, *(len(_both(each)) + 1 for counts in rows.values() for each in counts))  # counts [threads, 2]
    totals = {name: _both(counts.sum(axis=0)) for name, counts in rows.items()}
    last = max(3, *map(len, totals.values())) + 2
    first, end = window(num_threads, max(1, (width - label - last) // cell), thread)
    if (first, end) != (0, num_threads):
        title += f", threads {first} to {end - 1} of {num_threads}"
    header = line(" " * label)
    for t in range(first, end):
        header.append(f"{f'▶t{t}' if t == thread else f't{t}':>{cell}}", NOW if t == thread else DIM)
    lines = [rule(title, width), header.append(f"{'all':>{last}}", DIM)]
    for name, counts in rows.items():
        here = name == current or (name == "lengths" and current in _LENGTHS)
        row = line((f"{'▶' if here else ' '}{name:<{label - 1}}", TITLE if here else ""))
        for t in range(first, end):
            text = _both(counts[t])
            row.append(f"{text:>{cell}}", NOW if t == thread and here else DIM if text == "." else "")
        lines.append(row.append(f"{totals[name]:>{last}}", TITLE))
    return lines[:height]


_LENGTHS = ("seq_lens", "query_start_loc")


def _counter_rows(run: KernelRun, position: int, height: int) -> tuple[str, dict[str, IntArray]]:
    """The panel's title, and reads and writes of each thread [threads, 2] by the name of the array.

    Where `height` is less than all arrays need, only those of global memory, the lengths together.
    """
    counts = dict(zip((info.name for info in run.trace.arrays), run.counts(position), strict=True))
    in_global = ("query", "block_tables" if "block_tables" in counts else "starts", "keys", "values", "out", "lse")
    in_shared = [info.name for info in run.trace.arrays if info.space == "shared"]
    title = "reads and writes (w) so far"
    if height >= len(counts):
        return title, {name: counts[name] for name in (*_LENGTHS, *in_global, *in_shared)}
    lengths = counts["seq_lens"] + counts["query_start_loc"]
    return f"{title}, global memory", {"lengths": lengths, **{name: counts[name] for name in in_global}}


# ---- the layouts


def _shape(layout: str, letter: str, x: int) -> str:
    """The axes of K or of V."""
    if layout == "vLLM packed":
        return f"[blocks, heads, dim/{x}, slots, {x}]" if letter == "K" else "[blocks, heads, dim, slots]"
    return {
        "ours": "[blocks, slots, heads, dim] flash-attn",
        "vLLM [2, n, ...]": "[2, blocks, slots, heads, dim]",
        "vLLM [n, 2, ...]": "[blocks, 2, slots, heads, dim] NHD",
        "FlashInfer HND": "[blocks, 2, heads, slots, dim]",
    }[layout]


def layouts(run: KernelRun, position: int, width: int, height: int) -> Lines:
    """The warp's load of K or V at this moment (or the nearest one), and what it moves in other layouts."""
    at = run.nearest_load(position)
    info, load = run.info(at), run.load(at)
    costs = run.layout_costs(at)
    letter, itemsize = ("K" if info.name == "keys" else "V"), info.dtype.itemsize
    x = pack_size(itemsize)
    which = "this" if at == position else "the last" if at < position else "the next"
    lines = [rule(f"{which} {letter} load: {len(load.threads)} lanes, {load.bytes} bytes", width)]
    lines += _cost_table(costs, itemsize, whole_block=width >= 62)
    if width >= 100:
        for row, cost in zip(lines[2:], costs, strict=True):
            row.append("   " + _shape(cost.layout, letter, x), DIM)
    ends = [cost for cost in costs if cost.layout in ("ours", "vLLM packed")]
    lines += [_groups(cost, width) for cost in ends]
    text = _why_packed(letter, x, itemsize, len(ends) > 1)
    more = [line(""), *(line(" " + row) for row in wrap(text, width - 2))]
    if height >= len(lines) + len(more):
        lines += more
    if height >= len(lines) + 3 + len(costs) and width < 100:
        lines += [line(""), line((f" the axes of {letter}", DIM))]
        lines += [line(f" {cost.layout:<17}", _shape(cost.layout, letter, x)) for cost in costs]
    return lines[:height]


def _cost_table(costs: list[LayoutCost], itemsize: int, whole_block: bool) -> Lines:
    """A header and a row for each layout: what it moves in each way of loading. The fewest sectors are bold."""
    narrow = [(cost.sectors, f"{cost.sectors} ({cost.used:.0%})") for cost in costs]
    wide = [(cost.wide_sectors, f"{cost.wide_sectors} ({cost.wide_used:.0%})") for cost in costs if cost.wide_sectors]
    columns = [(f"{itemsize} B a lane", 10, narrow)]
    if wide:  # all layouts have it, or none
        columns.append(("16 B a lane", 13, wide))
    if whole_block:
        columns.append(("whole CUDA block", 19, [(cost.block_sectors, str(cost.block_sectors)) for cost in costs]))
    rows = [line((f"{' sectors (used)':<17}" + "".join(f"{title:>{room}}" for title, room, _ in columns), DIM))]
    for number, cost in enumerate(costs):
        row = line(f" {cost.layout:<16}")
        for _, room, cells in columns:
            sectors, text = cells[number]
            row.append(f"{text:>{room}}", TITLE if sectors == min(cells)[0] else "")
        rows.append(row)
    return rows


def _groups(cost: LayoutCost, width: int) -> Text:
    """Which threads' elements share a sector: `|0 1|2 3|4 5|`."""
    text = "│".join(" ".join(map(str, group)) for group in cost.groups)
    return line((f" {cost.layout.replace('vLLM ', ''):<7}", DIM), fit(f"│{text}│", width - 9))


def _why_packed(letter: str, x: int, itemsize: int, packs: bool) -> str:
    if not packs:
        return f"vLLM's packed layout needs a head size that is a multiple of x = 16 / {itemsize} = {x}."
    if letter == "V":
        return (
            "A V load takes neighbouring elements of one row, so whole rows (ours) fit it. vLLM's first kernel read V "
            "along the tokens, a thread for a few slots of a dimension: it laid V out with the slots last."
        )
    return (
        f"Each lane reads its own key's row. In ours the lanes are a row apart: a sector each, of which {itemsize} "
        f"bytes are used now. vLLM's first kernel packed x = {x} elements of neighbouring slots side by side: lanes "
        "that load 16 bytes each then ask for memory without gaps. Today's kernels put several lanes on a row instead."
    )
