"""The panels of the kernel walk: lists of lines of a given width and height.

source     the kernel, the line of the moment marked ▶, the lines that the other kernel has otherwise ≠
caches     the slots: the sequence of each, which are read now, what the CUDA block has read so far
now        the access itself, in its array; the warp's load and its 32-byte sectors

counts.py has the panels that count.
"""

from __future__ import annotations

from functools import cache

from pygments.token import Comment, Keyword, Number, String
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text

from ...core.checks import plural
from ..common.canvas import COLOURS, DIM, TITLE, Lines, exactly, fit, line, rule, window
from .kernel_run import IntArray, KernelRun
from .sizes import LETTERS
from .source import SourceLines

NOW = "bold reverse"


# ---- the source


# Readable on a dark and on a light ground.
_STYLES = {Comment: "dim italic", Keyword: "bold", String: "dim", Number: COLOURS[0]}
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
    current, focus = int(run.line[position]), 0
    rows: Lines = []
    for number, plain_row in _rows(run.code, _OTHER[run.name] if other else "", width, brief):
        row = plain_row
        if number == current:
            row = line(("▶", TITLE)).append_text(plain_row[1:])
            row.stylize(NOW)
            focus = len(rows)
        rows.append(row)
    first, end = window(len(rows), height, focus)
    return rows[first:end]


@cache
def _rows(code: SourceLines, other: str, width: int, brief: bool) -> list[tuple[int, Text]]:
    """Each line, with its number, and what kernel `other` has in place of it (number -1)."""
    rows = []
    for number, text in code.lines:
        different = number in code.different
        row = _highlighted(code)[number].copy()
        indent = len(text) - len(text.lstrip())
        pad = " " * (max(0, indent // 2 - 2) if brief else indent)
        if brief:
            cut = text.find("  # ", indent + 1)
            row = line(pad).append_text((row[:cut] if cut >= 0 else row)[indent:])
        row = exactly(line(" ", ("≠" if different else " ", TITLE), (f"{number:>3} ", DIM)).append_text(row), width)
        if different:
            row.stylize("bold underline", 6)
        rows.append((number, row))
        if different and other:
            instead = code.different[number].strip()
            rows.append((-1, exactly(line((f" ≠     {pad}{other}: {instead}", "italic")), width)))
    return rows


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
    lanes = plural(len(load.threads), "lane")
    verb = "store" if run.trace.write[position] else "load"
    if info.space != "global":
        return f"warp {load.threads[0] // 32}: {lanes} {verb} together, in shared memory: no sectors to move"
    moved = load.sectors * 32
    return (
        f"warp {load.threads[0] // 32}: {lanes} {verb} together: {load.bytes} bytes in "
        f"{plural(load.sectors, 'sector')} of 32 bytes ({load.bytes / moved:.0%} used)"
    )
