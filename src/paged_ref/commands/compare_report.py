"""What `paged-ref compare` prints: the plots, the article's three columns as tables, and conclusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..extras.plain_text import plain
from ..planner.comparison import Checked, ComparisonRow
from ..planner.setup import Setup
from ..planner.source_lines import lines_of
from ..planner.sweep import SHOWN, memory_over_time
from ..planner.traces import RequestTrace
from ..views.common.console import Console
from ..views.common.plots import Line
from . import html_report
from .compare_plots import latency_plot, memory_plot, picture
from .report_text import (
    PRICE,
    WAITS,
    limit_words,
    model_words,
    number_table,
    price_words,
    print_constants,
    print_heading,
    print_paragraph,
)

GIB = 2**30
UTILIZATION = (
    "Shares of the pool, mean over the measured time. Reserved: empty, and the sequence will use it. Internal: "
    "empty, and the sequence never will. External: holes too small for the next request, and what the buddy "
    "allocator rounds up. Occupancy: of the memory that a new request cannot get, the share that holds tokens, "
    "which is the measure of Fig. 2."
)
SCALABILITY = (
    "Sustained: accepted requests per second, with one always waiting, and how far the rate of more such requests "
    "may be off (95 %). Roofline: at most so many, whatever the order of the work. Running: sequences, mean. "
    "Limit: what keeps the next request out of the batch. Refused: could never fit."
)
ARTICLE = {  # its words for memory utilization, scalability, complexity
    "standard": ("poor", "limited", "low"),
    "swapping": ("moderate", "moderate", "medium"),
    "paged": ("high", "high", "high"),
}


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What was timed on this machine."""

    num_seqs: int  # that run in the timed batch
    micros: dict[str, float]  # by manager: microseconds of a scheduling step
    kernel_ratio: float  # time of the paged CPU kernel, times that of the contiguous one


def print_setting(console: Console, base: Setup, trace: RequestTrace) -> None:
    kv = base.num_slots * base.model.kv_bytes_per_token / GIB
    size = f": K and V of {base.num_slots:,} tokens in {kv:.1f} GiB, {base.model.kv_arithmetic}."
    console.print(Text.assemble((plain(base.model.name), "bold"), " on ", (base.gpu.name, "bold"), size))
    console.print(f"{plain(trace.describe())}.")
    for note in trace.notes:
        console.print(Padding(f"- {plain(note)}", (0, 0, 0, 2)))
    console.print(
        f"Requests of up to {base.longest:,} tokens, {base.max_batch_seqs} sequences and {base.max_batch_tokens:,} "
        "tokens in a step at most. The real schedulers and managers decide; the time of a step is computed from the "
        "datasheet and:"
    )
    print_constants(console, base.constants)
    for sentence in model_words(base):
        print_paragraph(console, sentence)


def print_report(console: Console, rows: Sequence[ComparisonRow], cost: MeasuredCost, trace: RequestTrace) -> None:
    goodput = rows[0].curve.goodput
    print_heading(console, "Where the K/V memory is, while requests wait")
    console.print(memory_plot(rows, console.width), no_wrap=True)
    print_heading(console, "Utilization")
    console.print(_utilization(rows))
    print_paragraph(console, UTILIZATION)
    print_heading(console, "Scalability")
    console.print(_scalability(rows))
    print_paragraph(console, SCALABILITY)
    if goodput:
        print_paragraph(
            console,
            f"Goodput: the highest rate at which the limits are met: {goodput.limits.describe()}. It is never above "
            "the sustained rate. X max compares goodput.",
        )
    print_heading(console, "Latency" if goodput else f"Latency, at {SHOWN:.0%} of the sustained rate")
    console.print(_latency(rows))
    print_paragraph(
        console,
        "Seconds to the first token (TTFT), and milliseconds for each token after it (TPOT), that 50, 90 and 99 of 100 "
        f"accepted requests do not exceed; {'at the goodput' if goodput else 'with a limit (--ttft) at the goodput'}.",
    )
    console.print(latency_plot(rows, console.width), no_wrap=True)
    print_heading(console, "Complexity")
    console.print(_complexity(rows, cost))
    print_paragraph(
        console,
        f"Lines: of code, counted from this package. Step: the bookkeeping of {cost.num_seqs} decoding sequences, "
        "timed now on this machine. Kernel time: that of the paged CPU kernel against that of the contiguous one, "
        "timed now. Moved: K and V copied on the device or over the link, for each generated token. Preempted: for "
        "each 100 requests.",
    )
    print_heading(console, "The article's table, measured")
    console.print(_article(rows, cost))
    if rows[0].curve.setup.gpu.price_per_hour is not None:
        print_paragraph(console, PRICE)
    for sentence in conclusions(rows, trace):
        print_paragraph(console, sentence)


def html(base: Setup, rows: Sequence[ComparisonRow], cost: MeasuredCost, trace: RequestTrace) -> str:
    """The same on one page, with the memory over time."""
    paged = next(row for row in rows if row.curve.setup.manager == "paged" and row.curve.setup.block_size >= 16)
    rate = SHOWN * paged.curve.steady.sustained_rate
    lines = [
        Line(row.curve.setup.label, memory_over_time(row.curve.setup, trace, rate))
        for row in rows
        if row is paged or row.curve.setup.label in ("standard max", "standard exact", "swapping")
    ]
    goodput = rows[0].curve.goodput
    parts = [
        html_report.paragraph(f"{trace.describe()}."),
        *map(html_report.paragraph, trace.notes),
        html_report.heading("Requests per second"),
        html_report.table(_scalability(rows)),
        html_report.paragraph(SCALABILITY),
        *([html_report.paragraph(f"Goodput under: {goodput.limits.describe()}.")] if goodput else []),
        html_report.heading("Latency"),
        html_report.table(_latency(rows)),
        picture(rows),
        html_report.heading("Memory"),
        html_report.table(_utilization(rows)),
        html_report.paragraph(UTILIZATION),
        html_report.memory_picture(lines, rate),
        html_report.heading("Cost in code and time"),
        html_report.table(_complexity(rows, cost)),
        html_report.heading("What follows"),
        *map(html_report.paragraph, conclusions(rows, trace)),
        html_report.heading("Every number that this rests on"),
        html_report.sources(base),
    ]
    return html_report.page(f"{base.model.name} on {base.gpu.name}: memory managers compared", parts)


def _table(*columns: str) -> Table:
    return number_table(*columns, padding=(0, 0, 0, 1), pad_edge=False)


def _utilization(rows: Sequence[ComparisonRow]) -> Table:
    table = _table("", "tokens", "reserved", "internal", "external", "free", "occupancy")
    for row in rows:
        shares = row.curve.steady.outcome.shares
        parts = (shares.tokens, shares.reserved, shares.internal, shares.external, shares.free + shares.cached)
        table.add_row(row.curve.setup.label, *(f"{part:.1%}" for part in (*parts, shares.occupancy)))
    return table


def _scalability(rows: Sequence[ComparisonRow]) -> Table:
    most, limited = rows[0].curve.rate, rows[0].curve.goodput is not None
    priced = rows[0].curve.setup.gpu.price_per_hour is not None
    table = _table(
        "", "sustained", *(["goodput"] if limited else []), "x max", "roofline", "running", "limit", "refused",
        *(["price of\n10^6"] if priced else []),
    )  # fmt: skip
    for row in rows:
        curve, steady = row.curve, row.curve.steady
        table.add_row(
            curve.setup.label,
            f"{_rate(steady.sustained_rate)} ±{steady.half_width:{'.2f' if steady.sustained_rate >= 0.1 else '.2g'}}",
            *([_rate(curve.rate) if curve.rate else "none"] if limited else []),
            f"{curve.rate / most:.2f}" if most else "",
            _rate(steady.roofline),
            f"{steady.outcome.running_mean:.1f}",
            steady.admission,
            f"{steady.num_refused:,}",
            *([price_words(curve.price)] if priced else []),
        )
    return table


def _latency(rows: Sequence[ComparisonRow]) -> Table:
    table = _table("", "at\nreq/s", "TTFT, s\np50", "\np90", "\np99", "TPOT, ms\np50", "\np90", "\np99", "waits\nfor")
    for row in rows:
        point = row.curve.shown
        if point is None:
            table.add_row(row.curve.setup.label, "none")
            continue
        first, each = point.outcome.first_token, point.outcome.each_token
        table.add_row(
            row.curve.setup.label,
            _rate(point.rate),
            *(f"{seconds:.3g}" for seconds in (first.p50, first.p90, first.p99)),
            *(f"{1000 * seconds:.0f}" for seconds in (each.p50, each.p90, each.p99)),
            WAITS[row.curve.steady.step.bound],
        )
    return table


def _rate(value: float) -> str:
    """Two decimals, or three digits of a small number."""
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.3g}"


def _complexity(rows: Sequence[ComparisonRow], cost: MeasuredCost) -> Table:
    table = _table("", "manager", "kernel", "step", "kernel\ntime", "moved", "preempted")
    for row in rows:
        setup, (manager, kernel) = row.curve.setup, lines_of(row.curve.setup)
        table.add_row(
            setup.label,
            f"{manager} lines",
            f"{kernel} lines",
            f"{cost.micros[setup.manager]:.0f} µs",
            f"{cost.kernel_ratio:.2f}x" if setup.manager == "paged" else "1",
            f"{row.moved_per_token / 1024:.0f} KiB",
            f"{100 * row.curve.steady.outcome.preemptions / row.curve.steady.outcome.finished:.0f}",
        )
    return table


def _article(rows: Sequence[ComparisonRow], cost: MeasuredCost) -> Table:
    """A line for each technique of the article: the article's word, and our numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("technique", "memory utilization", "scalability", "complexity"):
        table.add_column(column, no_wrap=column == "technique")
    for manager, (used, scale, effort) in ARTICLE.items():
        of_manager = [row for row in rows if row.curve.setup.manager == manager]
        occupancy = [100 * row.curve.steady.outcome.shares.occupancy for row in of_manager]
        lines = [sum(lines_of(row.curve.setup)) for row in of_manager]
        table.add_row(
            manager,
            f"{used}: {_range(occupancy, '.0f')} % tokens",
            f"{scale}: {_range([row.curve.steady.outcome.running_mean for row in of_manager], '.0f')} running, "
            f"{_range([row.curve.rate for row in of_manager], '.2f')} requests/s",
            f"{effort}: {_range(lines, '.0f')} lines, {cost.micros[manager]:.0f} µs a step",
        )
    return table


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def conclusions(rows: Sequence[ComparisonRow], trace: RequestTrace) -> list[str]:
    """What the numbers say, in sentences."""
    paged = min(
        (row for row in rows if row.curve.setup.manager == "paged" and not row.curve.setup.prefix_cache),
        key=lambda row: abs(row.curve.setup.block_size - 16),
    )
    cached = next(row for row in rows if row.curve.setup.prefix_cache).curve.steady.outcome
    found = f"knew {cached.hit_rate:.1%} of the prompts' tokens."
    nothing = "found nothing: no two of these requests begin with the same tokens, as far as is known."
    return [
        _gains(rows, paged),
        f"{paged.curve.setup.label}: {limit_words(paged.curve.steady)}",
        *_arrival(paged, trace),
        *_reservations(paged),
        _longest(rows),
        f"The prefix cache {found if cached.known_tokens else nothing}",
    ]


def _gains(rows: Sequence[ComparisonRow], paged: ComparisonRow) -> str:
    """The rate of the paged row against those of the others."""
    by_label = {row.curve.setup.label: row for row in rows}
    gains = [
        f"{paged.curve.rate / by_label[label].curve.rate:.2f}x {label}"
        for label in ("standard max", "standard exact", "exact, first fit", "swapping")
        if by_label[label].curve.rate and paged.curve.rate
    ]
    if not gains:
        return "No rate meets these limits: longer ones (--ttft, --tpot, --latency) compare more."
    goal = "Within these limits" if paged.curve.goodput else "When requests always wait"
    return f"{goal}, {paged.curve.setup.label} serves {', '.join(gains)}, in requests per second."


def _arrival(paged: ComparisonRow, trace: RequestTrace) -> list[str]:
    """Whether the recorded requests come so slowly that no manager is at its limit."""
    steady = paged.curve.steady
    if not trace.timed or trace.rate == float("inf"):
        return []
    accepted = trace.rate * steady.num_requests / len(trace.requests)
    below = accepted < steady.sustained_rate
    what = (
        "below what paged memory sustains: there arrival is the limit" if below else "more than paged memory sustains"
    )
    return [f"As recorded, {accepted:.2f} accepted requests arrive per second, {what}."]


def _reservations(paged: ComparisonRow) -> list[str]:
    """What limits the comparison: refused requests, and outputs that were cut."""
    steady, sentences = paged.curve.steady, []
    if steady.num_refused:
        sentences.append(f"{steady.num_refused} requests were refused; the first: {steady.refusal}.")
    if steady.num_cut:
        sentences.append(f"{steady.num_cut} outputs were cut at the context of {paged.curve.setup.longest:,}.")
    return sentences


def _longest(rows: Sequence[ComparisonRow]) -> str:
    """The longest request that fits at all."""
    labels: dict[int, list[str]] = {}
    for row in rows:
        labels.setdefault(row.longest, []).append(row.curve.setup.label)
    if len(labels) == 1:
        return f"The longest request that fits has {rows[0].longest:,} tokens, with each manager."
    each = "; ".join(f"{tokens:,} tokens with {', '.join(names)}" for tokens, names in labels.items())
    return f"The longest request that fits: {each}."


# --- the embedded model --------------------------------------------------------------------------------


def print_checked(console: Console, trace: RequestTrace, checked: Sequence[Checked]) -> None:
    print_heading(console, "The embedded model, for real")
    print_paragraph(console, f"{trace.describe()}; {'; '.join(trace.notes)}.")
    table = _table("", "occupancy, simulated", "run", "steps", "each step the same")
    for each in checked:
        shares = f"{each.simulated.occupancy:.2%}", f"{each.ran.occupancy:.2%}"
        table.add_row(each.label, *shares, f"{each.steps}", "yes" if each.same else "NO")
    console.print(table)
    print_paragraph(
        console,
        "The same: which sequences ran, for how many tokens, which were preempted, what moved, where memory was.",
    )
