"""What `paged-ref compare` reports: the plots, the article's three columns as tables, and conclusions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from ..planner.comparison import Checked
from ..planner.setup import Setup
from ..planner.source_lines import lines_of
from ..planner.sweep import SHOWN, Curve
from ..planner.traces import RequestTrace
from . import report_text as report
from .compare_plots import latency_plot, memory_plot, picture
from .html_report import memory_over_time_picture

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


IN_TIME = ("standard max", "standard exact", "swapping")  # with paged: the memory over time


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What was timed on this machine."""

    num_seqs: int  # that run in the timed batch
    micros: dict[str, float]  # by manager: microseconds of a scheduling step
    kernel_ratio: float  # time of the paged CPU kernel, times that of the contiguous one


def title_of(base: Setup) -> str:
    return f"{base.model.name} on {base.gpu.name}: memory managers compared"


def setting(base: Setup, trace: RequestTrace) -> Iterator[report.Part]:
    """What is known before anything runs."""
    kv = base.num_slots * base.model.kv_bytes_per_token / GIB
    yield f"K and V of {base.num_slots:,} tokens in {kv:.1f} GiB: {base.model.kv_arithmetic}."
    yield f"{trace.describe()}."
    yield from (f"- {note}" for note in trace.notes)
    yield (
        f"Requests of up to {base.longest:,} tokens, {base.max_batch_seqs} sequences and {base.max_batch_tokens:,} "
        "tokens in a step at most. The real schedulers and managers decide; the time of a step is computed from the "
        "datasheet and assumptions:"
    )
    yield report.constants_table(base.constants)
    yield from report.model_words(base)


def results(rows: Sequence[Curve], cost: MeasuredCost, trace: RequestTrace) -> Iterator[report.Part]:
    goodput, paged = rows[0].goodput, _paged(rows)
    yield report.Heading("Where the K/V memory is, while requests wait")
    yield report.OnScreen(lambda columns: memory_plot(rows, columns))
    yield report.OnPage(lambda: picture(rows))
    yield report.Heading("Utilization")
    yield _utilization(rows)
    yield UTILIZATION
    in_time = [row for row in rows if row is paged or row.setup.label in IN_TIME]
    yield memory_over_time_picture(in_time, trace, SHOWN * paged.steady.sustained_rate)
    yield report.Heading("Scalability")
    yield _scalability(rows)
    yield SCALABILITY
    if goodput:
        yield from report.goodput_words(goodput.limits)
        yield "X max compares goodput."
    yield report.Heading("Latency" if goodput else f"Latency, at {SHOWN:.0%} of the sustained rate")
    yield _latency(rows)
    yield (
        "Seconds to the first token (TTFT), and milliseconds for each token after it (TPOT), that 50, 90 and 99 of 100 "
        f"accepted requests do not exceed; {'at the goodput' if goodput else 'with a limit (--ttft) at the goodput'}."
    )
    yield report.OnScreen(lambda columns: latency_plot(rows, columns))
    yield report.Heading("Complexity")
    yield _complexity(rows, cost)
    yield (
        f"Lines: of code, counted from this package. Step: the bookkeeping of {cost.num_seqs} decoding sequences, "
        "timed now on this machine. Kernel time: that of the paged CPU kernel against that of the contiguous one, "
        "timed now. Moved: K and V copied on the device or over the link, for each generated token. Preempted: for "
        "each 100 requests."
    )
    yield report.Heading("The article's table, measured")
    yield _article(rows, cost)
    yield from report.price_sentence(paged.setup)
    yield _gains(rows, paged)
    yield f"{paged.setup.label}: {report.limit_words(paged.steady)}"
    yield from _arrival(paged, trace)
    yield from report.left_out_words(paged.steady)
    yield _longest(rows)
    for cached in (row.steady.outcome for row in rows if row.setup.prefix_cache):
        found = f"knew {cached.hit_rate:.1%} of the prompts' tokens."
        nothing = "found nothing: no two of these requests begin with the same tokens, as far as is known."
        yield f"The prefix cache {found if cached.known_tokens else nothing}"


def _paged(rows: Sequence[Curve]) -> Curve:
    """Paged memory with blocks of about 16."""
    paged = [row for row in rows if row.setup.manager == "paged" and not row.setup.prefix_cache]
    return min(paged, key=lambda row: abs(row.setup.block_size - 16))


def _table(*columns: str) -> Table:
    return report.number_table(*columns, wrap_names=True, padding=(0, 0, 0, 1), pad_edge=False)


def _utilization(rows: Sequence[Curve]) -> Table:
    table = _table("", "tokens", "reserved", "internal", "external", "free", "occupancy")
    for row in rows:
        shares = row.steady.outcome.shares
        parts = (shares.tokens, shares.reserved, shares.internal, shares.external, shares.free + shares.cached)
        table.add_row(row.setup.label, *(f"{part:.1%}" for part in (*parts, shares.occupancy)))
    return table


def _scalability(rows: Sequence[Curve]) -> Table:
    most = rows[0].rate if rows[0].setup.label == "standard max" else 0.0  # it may be left out
    limited = rows[0].goodput is not None
    priced = rows[0].setup.gpu.price_per_hour is not None
    table = _table(
        "", "sustained", *(["good-\nput"] if limited else []), "x max", "roof-\nline", "run-\nning", "limit",
        "re-\nfused", *(["price\n10^6"] if priced else []),
    )  # fmt: skip
    for row in rows:
        steady, rate = row.steady, row.steady.sustained_rate
        table.add_row(
            row.setup.label,
            f"{report.rate_words(rate)} ±{report.rate_words(steady.half_width, rate)}",
            *([report.rate_words(row.rate) if row.rate else "none"] if limited else []),
            f"{row.rate / most:.2f}" if most else "",
            report.rate_words(steady.roofline),
            f"{steady.outcome.running_mean:.1f}",
            steady.admission,
            f"{steady.num_refused:,}",
            *([report.price_words(row.price)] if priced else []),
        )
    return table


def _latency(rows: Sequence[Curve]) -> Table:
    table = _table("", "at\nreq/s", "TTFT, s\np50", "\np90", "\np99", "TPOT, ms\np50", "\np90", "\np99", "waits\nfor")
    for row in rows:
        point = row.shown
        if point is None:
            table.add_row(row.setup.label, "none")
            continue
        first, each = point.outcome.first_token, point.outcome.each_token
        table.add_row(
            row.setup.label,
            report.rate_words(point.rate),
            *(f"{seconds:.3g}" for seconds in (first.p50, first.p90, first.p99)),
            *(f"{1000 * seconds:.0f}" for seconds in (each.p50, each.p90, each.p99)),
            report.WAITS[row.steady.step.bound],
        )
    return table


def _complexity(rows: Sequence[Curve], cost: MeasuredCost) -> Table:
    table = _table("", "manager", "kernel", "step", "kernel\ntime", "moved", "preempted")
    for row in rows:
        setup, (manager, kernel) = row.setup, lines_of(row.setup)
        table.add_row(
            setup.label,
            f"{manager} lines",
            f"{kernel} lines",
            f"{cost.micros[setup.manager]:.0f} µs",
            f"{cost.kernel_ratio:.2f}x" if setup.manager == "paged" else "1",
            f"{row.steady.outcome.moved_per_token / 1024:.0f} KiB",
            f"{100 * row.steady.outcome.preemptions / row.steady.outcome.finished:.0f}",
        )
    return table


def _article(rows: Sequence[Curve], cost: MeasuredCost) -> Table:
    """A line for each technique of the article: the article's word, and our numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("technique", "memory utilization", "scalability", "complexity"):
        table.add_column(column, no_wrap=column == "technique")
    for manager, (used, scale, effort) in ARTICLE.items():
        of_manager = [row for row in rows if row.setup.manager == manager]
        if not of_manager:
            continue
        occupancy = [100 * row.steady.outcome.shares.occupancy for row in of_manager]
        lines = [sum(lines_of(row.setup)) for row in of_manager]
        table.add_row(
            manager,
            f"{used}: {_range(occupancy, '.0f')} % tokens",
            f"{scale}: {_range([row.steady.outcome.running_mean for row in of_manager], '.0f')} running, "
            f"{_range([row.rate for row in of_manager], '.2f')} requests/s",
            f"{effort}: {_range(lines, '.0f')} lines, {cost.micros[manager]:.0f} µs a step",
        )
    return table


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _gains(rows: Sequence[Curve], paged: Curve) -> str:
    """The rate of the paged row against those of the others."""
    others = ("standard max", "standard exact", "exact, first fit", "swapping")
    gains = [
        f"{paged.rate / row.rate:.2f}x {row.setup.label}"
        for row in rows
        if row.setup.label in others and row.rate and paged.rate
    ]
    if not gains:
        return "No rate meets these limits: longer ones (--ttft, --tpot, --latency) compare more."
    goal = "Within these limits" if paged.goodput else "When requests always wait"
    return f"{goal}, {paged.setup.label} serves {', '.join(gains)}, in requests per second."


def _arrival(paged: Curve, trace: RequestTrace) -> list[str]:
    """Whether the recorded requests come so slowly that no manager is at its limit."""
    steady = paged.steady
    if not trace.timed or trace.rate == float("inf"):
        return []
    accepted = trace.rate * steady.num_requests / len(trace.requests)
    below = accepted < steady.sustained_rate
    what = (
        "below what paged memory sustains: there arrival is the limit" if below else "more than paged memory sustains"
    )
    return [f"As recorded, {accepted:.2f} accepted requests arrive per second, {what}."]


def _longest(rows: Sequence[Curve]) -> str:
    """The longest request that fits at all."""
    labels: dict[int, list[str]] = {}
    for row in rows:
        labels.setdefault(row.setup.longest_request(), []).append(row.setup.label)
    if len(labels) == 1:
        return f"The longest request that fits has {next(iter(labels)):,} tokens, with each manager."
    each = "; ".join(f"{tokens:,} tokens with {', '.join(names)}" for tokens, names in labels.items())
    return f"The longest request that fits: {each}."


# --- the embedded model --------------------------------------------------------------------------------


def with_the_model(trace: RequestTrace, checked: Sequence[Checked]) -> Iterator[report.Part]:
    yield report.Heading("The embedded model, for real")
    yield f"{trace.describe()}; {'; '.join(trace.notes)}."
    table = _table("", "occupancy, simulated", "run", "steps", "each step the same")
    for each in checked:
        shares = f"{each.simulated.occupancy:.2%}", f"{each.ran.occupancy:.2%}"
        table.add_row(each.label, *shares, f"{each.steps}", "yes" if each.same else "NO")
    yield table
    yield "The same: which sequences ran, for how many tokens, which were preempted, what moved, where memory was."
