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
from ..planner.traces import RequestTrace
from ..views.common.console import Console
from .compare_plots import latency_plot, memory_plot
from .report_text import number_table, print_constants, print_heading, print_paragraph

GIB = 2**30
FEW_REQUESTS = 500  # with fewer, a rate says little
ARTICLE = {  # its words for memory utilization, scalability, complexity
    "standard": ("poor", "limited", "low"),
    "swapping": ("moderate", "moderate", "medium"),
    "paged": ("high", "high", "high"),
}
BOUND_BY_COMPUTE = (
    "Its steps wait for arithmetic, most of it for prompts. More running sequences than the GPU can compute for bring "
    "nothing, so better memory management cannot show here. It shows where memory is shorter (--kv-tokens), or where "
    "contexts are longer, so that fewer sequences fit."
)
BOUND_BY_READING = (
    "Its steps wait for weights and K and V to be read, and the weights are read once for all sequences: more running "
    "sequences are more requests per second."
)


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What was timed on this machine."""

    num_seqs: int  # that run in the timed batch
    micros: dict[str, float]  # by manager: microseconds of a scheduling step
    kernel_ratio: float  # time of the paged CPU kernel, times that of the contiguous one


def print_setting(console: Console, base: Setup, trace: RequestTrace, bound: float) -> None:
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


def print_report(console: Console, rows: Sequence[ComparisonRow], cost: MeasuredCost) -> None:
    bound = rows[0].curve.bound
    print_heading(console, "Where the K/V memory is, while requests wait (all arrive at the same time)")
    console.print(memory_plot(rows, console.width), no_wrap=True)
    print_heading(console, "Utilization")
    console.print(_utilization(rows))
    print_paragraph(
        console,
        "Shares of the pool, mean over the time in which a request waits (over all the time if none ever does). "
        "Reserved: empty, and the sequence will use it. Internal: empty, and the sequence never will. External: holes "
        "too small for the next request, and what the buddy allocator rounds up. Occupancy: of the memory that a new "
        "request cannot get, the share that holds tokens, which is the measure of Fig. 2.",
    )
    print_heading(console, "Scalability")
    console.print(_scalability(rows))
    print_paragraph(
        console,
        "Mean, most: sequences that run while others wait; all requests arrive at the same time. Longest: the longest "
        f"request that fits at all. Req/s: requests per second at a mean latency of {bound:g} s for each output token; "
        "on paper: predicted from the lengths and the roofline, memory always full. Preempted: when all requests "
        "arrive at the same time.",
    )
    console.print(latency_plot(rows, console.width), no_wrap=True)
    print_heading(console, "Complexity")
    console.print(_complexity(rows, cost))
    print_paragraph(
        console,
        f"Lines: of code, counted from this package. Step: the bookkeeping of {cost.num_seqs} decoding sequences, "
        "timed now on this machine. Kernel time: that of the paged CPU kernel against that of the contiguous one, "
        "timed now. Moved: K and V copied on the device or over the link, for each generated token.",
    )
    print_heading(console, "The article's table, measured")
    console.print(_article(rows, cost))
    for sentence in conclusions(rows):
        print_paragraph(console, sentence)


def _table(*columns: str) -> Table:
    return number_table(*columns, padding=(0, 0, 0, 1), pad_edge=False)


def _utilization(rows: Sequence[ComparisonRow]) -> Table:
    table = _table("", "tokens", "reserved", "internal", "external", "free", "occupancy")
    for row in rows:
        shares = row.curve.at_once.shares
        parts = (shares.tokens, shares.reserved, shares.internal, shares.external, shares.free + shares.cached)
        table.add_row(row.curve.setup.label, *(f"{part:.1%}" for part in (*parts, shares.occupancy)))
    return table


def _scalability(rows: Sequence[ComparisonRow]) -> Table:
    most = rows[0].curve.rate
    table = _table("", "mean", "most", "longest", "req/s", "x max", "on paper", "preempted")
    for row in rows:
        curve, at_once = row.curve, row.curve.at_once
        table.add_row(
            curve.setup.label,
            f"{at_once.running_short:.1f}",
            f"{at_once.running_peak}",
            f"{row.longest:,}",
            f"{curve.rate:.2f}" if curve.rate else "none",
            f"{curve.rate / most:.2f}" if most else "",
            f"{row.prediction.requests_per_second:.2f}",
            f"{at_once.preemptions}",
        )
    return table


def _complexity(rows: Sequence[ComparisonRow], cost: MeasuredCost) -> Table:
    table = _table("", "manager", "kernel", "step", "kernel time", "moved")
    for row in rows:
        setup, (manager, kernel) = row.curve.setup, lines_of(row.curve.setup)
        table.add_row(
            setup.label,
            f"{manager} lines",
            f"{kernel} lines",
            f"{cost.micros[setup.manager]:.0f} µs",
            f"{cost.kernel_ratio:.2f}x" if setup.manager == "paged" else "1",
            f"{row.moved_per_token / 1024:.0f} KiB",
        )
    return table


def _article(rows: Sequence[ComparisonRow], cost: MeasuredCost) -> Table:
    """A line for each technique of the article: the article's word, and our numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("technique", "memory utilization", "scalability", "complexity"):
        table.add_column(column, no_wrap=column == "technique")
    for manager, (used, scale, effort) in ARTICLE.items():
        of_manager = [row for row in rows if row.curve.setup.manager == manager]
        lines = [sum(lines_of(row.curve.setup)) for row in of_manager]
        table.add_row(
            manager,
            f"{used}: {_range([100 * row.curve.at_once.shares.occupancy for row in of_manager], '.0f')} % tokens",
            f"{scale}: {_range([row.curve.at_once.running_short for row in of_manager], '.0f')} running, "
            f"{_range([row.curve.rate for row in of_manager], '.2f')} requests/s",
            f"{effort}: {_range(lines, '.0f')} lines, {cost.micros[manager]:.0f} µs a step",
        )
    return table


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def conclusions(rows: Sequence[ComparisonRow]) -> list[str]:
    """What the numbers say, in sentences."""
    paged = min(
        (row for row in rows if row.curve.setup.manager == "paged" and not row.curve.setup.prefix_cache),
        key=lambda row: abs(row.curve.setup.block_size - 16),
    )
    cached = next(row for row in rows if row.curve.setup.prefix_cache).curve.at_once
    found = f"knew {cached.hit_rate:.1%} of the prompts' tokens."
    nothing = "found nothing: no two of these requests begin with the same tokens, as far as is known."
    return [
        _gains(rows, paged),
        BOUND_BY_COMPUTE if paged.prediction.step.bound == "compute" else BOUND_BY_READING,
        *_reservations(paged),
        f"The prefix cache {found if cached.known_tokens else nothing}",
    ]


def _gains(rows: Sequence[ComparisonRow], paged: ComparisonRow) -> str:
    """Requests per second of the paged row against those of the others."""
    by_label = {row.curve.setup.label: row for row in rows}
    gains = []
    for label in ("standard max", "standard exact", "exact, first fit", "swapping"):
        other = by_label[label]
        if other.curve.rate and paged.curve.rate:
            expected = paged.prediction.requests_per_second / other.prediction.requests_per_second
            gains.append(f"{paged.curve.rate / other.curve.rate:.2f}x {label} (predicted {expected:.2f}x)")
    if not gains:
        return "No rate keeps this latency: a longer one (--latency) compares more."
    return f"At the same latency, {paged.curve.setup.label} serves {', '.join(gains)}."


def _reservations(paged: ComparisonRow) -> list[str]:
    """What limits the comparison: few requests, refused ones, outputs that were cut."""
    outcome, sentences = paged.curve.at_once, []
    if outcome.finished < FEW_REQUESTS:
        sentences.append(
            f"{outcome.finished} requests end before a queue is long, so the rates are too high, most of all those of "
            "paged: take more (--requests)."
        )
    if outcome.refused:
        sentences.append(f"{outcome.refused} requests were refused; the first: {outcome.refusal}.")
    if outcome.cut:
        sentences.append(f"{outcome.cut} outputs were cut at the context of {paged.curve.setup.longest:,}.")
    return sentences


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
