"""The panels of the kernel walk: lists of lines of a given width and height.

source     the kernel, the line of the moment marked ▶, the lines that the other kernel has otherwise ≠
caches     the slots: the sequence of each, which are read now, what the CUDA block has read so far
now        the access itself, in its array; the warp's load and its 32-byte sectors
counters   reads and writes of each thread
layouts    what the same warp load would move in the cache layouts of other systems
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

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
_THEME = ANSISyntaxTheme(
    {
        Comment: Style(dim=True, italic=True),
        Keyword: Style(bold=True),
        String: Style(dim=True),
        Number: Style(color="cyan"),
    }
)


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


class _CounterRow(NamedTuple):
    """The counters of an array, or of several together, in one line."""

    name: str
    current: bool  # the access of the moment is to this array
    threads: list[str]
    total: str


def counters(run: KernelRun, position: int, width: int, height: int) -> Lines:
    """Reads and writes of each thread in each array, in this CUDA block up to now; `w` marks the writes."""
    title, rows = _counter_rows(run, position, height - 2)
    thread, num_threads = int(run.trace.thread[position]), run.trace.num_threads
    label = max(len(row.name) for row in rows) + 2
    cell = max(5, *(len(text) + 1 for row in rows for text in row.threads))
    last = max(3, *(len(row.total) for row in rows)) + 2
    first, end = window(num_threads, max(1, (width - label - last) // cell), thread)
    if (first, end) != (0, num_threads):
        title += f", threads {first} to {end - 1} of {num_threads}"
    header = line(" " * label)
    for t in range(first, end):
        header.append(f"{f'▶t{t}' if t == thread else f't{t}':>{cell}}", NOW if t == thread else DIM)
    header.append(f"{'all':>{last}}", DIM)
    lines = [rule(title, width), header]
    for row in rows:
        drawn = line((f"{'▶' if row.current else ' '}{row.name:<{label - 1}}", TITLE if row.current else ""))
        for t in range(first, end):
            text = row.threads[t]
            drawn.append(f"{text:>{cell}}", NOW if t == thread and row.current else DIM if text == "." else "")
        lines.append(drawn.append(f"{row.total:>{last}}", TITLE))
    return lines[:height]


def _counter_rows(run: KernelRun, position: int, height: int) -> tuple[str, list[_CounterRow]]:
    """The panel's title and a row for each array; where `height` is less, only those of global memory."""
    arrays, current = run.trace.arrays, int(run.trace.array[position])
    numbers = {info.name: number for number, info in enumerate(arrays)}
    counts = run.counts(position)

    def row(name: str, *names: str) -> _CounterRow:
        members = [numbers[each] for each in names or (name,)]
        total = counts[members].sum(axis=0)
        return _CounterRow(name, current in members, [_both(each) for each in total], _both(total.sum(axis=0)))

    lengths = ("seq_lens", "query_start_loc")
    in_global = ("query", "block_tables" if "block_tables" in numbers else "starts", "keys", "values", "out", "lse")
    in_shared = [info.name for info in arrays if info.space == "shared"]
    title = "reads and writes (w) so far"
    if height >= len(lengths) + len(in_global) + len(in_shared):
        return title, [row(name) for name in (*lengths, *in_global, *in_shared)]
    return f"{title}, global memory", [row("lengths", *lengths), *(row(name) for name in in_global)]


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


class _CostColumn(NamedTuple):
    """What each layout moves, in one way of loading."""

    title: str
    width: int
    sectors: list[int]
    used: list[float] | None  # share of the bytes moved

    def cell(self, row: int) -> tuple[str, str]:
        """The text of a layout's cell, and its style: the fewest sectors are bold."""
        sectors = self.sectors[row]
        text = f"{sectors} ({self.used[row]:.0%})" if self.used else str(sectors)
        return f"{text:>{self.width}}", TITLE if sectors == min(self.sectors) else ""


def layouts(run: KernelRun, position: int, width: int, height: int) -> Lines:
    """The warp's load of K or V at this moment (or the nearest one), and what it moves in other layouts."""
    at = run.nearest_load(position)
    info, load = run.info(at), run.load(at)
    costs = run.layout_costs(at)
    letter, itemsize = ("K" if info.name == "keys" else "V"), info.dtype.itemsize
    x = pack_size(itemsize)
    which = "this" if at == position else "the last" if at < position else "the next"
    columns = _cost_columns(costs, itemsize, whole_block=width >= 62)
    header = f"{' sectors (used)':<17}" + "".join(f"{column.title:>{column.width}}" for column in columns)
    lines = [rule(f"{which} {letter} load: {len(load.threads)} lanes, {load.bytes} bytes", width), line((header, DIM))]
    for number, cost in enumerate(costs):
        row = line(f" {cost.layout:<16}", *(column.cell(number) for column in columns))
        if width >= 100:
            row.append("   " + _shape(cost.layout, letter, x), DIM)
        lines.append(row)
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


def _cost_columns(costs: list[LayoutCost], itemsize: int, whole_block: bool) -> list[_CostColumn]:
    columns = [_CostColumn(f"{itemsize} B a lane", 10, [cost.sectors for cost in costs], [cost.used for cost in costs])]
    wide = [(cost.wide_sectors, cost.wide_used) for cost in costs if cost.wide_sectors and cost.wide_used]
    if wide:  # all layouts have it, or none
        columns.append(_CostColumn("16 B a lane", 13, [sectors for sectors, _ in wide], [used for _, used in wide]))
    if whole_block:
        columns.append(_CostColumn("whole CUDA block", 19, [cost.block_sectors for cost in costs], None))
    return columns


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
