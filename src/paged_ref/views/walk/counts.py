"""The panels of the kernel walk that count: reads and writes of each thread, and what a load moves in each layout."""

from __future__ import annotations

from rich.text import Text

from ...interop.layouts import pack_size
from ..common.canvas import DIM, TITLE, Lines, exactly, filled, fit, line, rule, window, wrap
from .kernel_run import IntArray, KernelRun
from .layout_costs import LayoutCost, layout_costs
from .panels import NOW


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
    return filled(lines, height)


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
    costs = layout_costs(run, at)
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
    return filled(lines, height)


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
