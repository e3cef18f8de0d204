"""What `paged-ref assess` reports: an assessment in words and tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..planner.assess import BEND, PAGED, WASTE_LIMIT, Assessment
from ..planner.hardware import GIB, GPUS
from ..planner.metrics import Limits
from ..planner.models import MODELS
from ..planner.settings import servers
from ..planner.sweep import SHOWN
from ..planner.traces import RequestTrace
from ..views.common.canvas import size_of
from ..views.common.console import Console
from ..views.common.plots import Line, round_up, svg
from . import report_text as report
from .compare_plots import bars_of
from .html_report import memory_over_time_picture

PAGE_WIDTH = 200  # columns of a table that is no terminal's
MODEL_COLUMNS = ("params\n(10^9)", "layers", "heads", "KV\nheads", "context", "K, V\nbytes")
GPU_COLUMNS = ("memory", "bandwidth", "fp16,\ndense", "link,\none way")


def title_of(found: Assessment) -> str:
    return f"{found.model.name} on {found.gpu.name}: what paging brings"


def results(found: Assessment, trace: RequestTrace, source: str, limits: Limits, width: int) -> Iterator[report.Part]:
    """`width`: columns of the tables."""
    gpu, model = found.gpu, found.model
    yield f"{source}."
    yield f"A sequence may have {found.max_model_len:,} tokens; `standard max` reserves this for each."
    yield from report.left_out_words(found.paged)
    yield report.Heading("Memory")
    share = f"{found.setup.constants.memory_share:.0%} of {_size(gpu.memory_bytes)}, less the weights"
    yield report.rows_table(
        [
            ("K, V a token", model.kv_arithmetic),
            (f"of {found.longest:,} tokens", _size(model.kept(found.longest))),
            ("weights", f"{model.num_parameters:,} x {model.weight_bits} bits = {_size(model.weight_bytes)}"),
            ("left for K, V", f"{share} = {_size(found.kv_bytes)} = {found.num_tokens:,} tokens"),
        ]
    )
    yield from report.model_words(found.setup)
    yield report.Heading("How many requests are served")
    yield _plans(found, bool(limits), width)
    yield (
        "Sustained: requests per second with one always waiting, by the real scheduler and manager, as in paged-ref "
        f"compare; 95 of 100 times within ±. At most {found.setup.max_batch_seqs} sequences run, and a step computes "
        f"at most {found.setup.max_batch_tokens:,} tokens. Roofline: at most so many, in any order."
    )
    yield from report.goodput_words(limits)
    yield from report.price_sentence(found.setup)
    yield _gain(found)
    yield report.OnPage(lambda: picture(found))
    served = [plan.served for plan in found.plans if plan.served]
    yield memory_over_time_picture(served, trace, SHOWN * found.paged.sustained_rate)
    yield report.Heading("What limits it")
    yield f"Paged: {report.limit_words(found.paged)}"
    yield report.Heading(f"How many sequences: {found.advised:,}")
    yield _batches(found)
    yield _sequence_advice(found, limits)
    yield report.Heading(f"Block size: {found.block_size}, and swap or compute again")
    yield _block_sizes(found)
    yield _block_advice(found)
    yield _swap_advice(found)
    yield report.Heading("The same elsewhere")
    for server in servers(found):
        yield f"{server.name} ({server.version}, looked up {server.looked_up})"
        yield report.Code(server.command)
        yield from (f"- {sentence}" for sentence in server.supports)
    yield report.Heading("Assumed, beside the datasheet")
    yield report.constants_table(found.setup.constants)
    yield "paged-ref compare runs the real managers over real arrivals: waiting, holes, preemptions."


def _plans(found: Assessment, limited: bool, width: int) -> Table:
    """Numbers are never cut: in a narrow window the columns stand closer, and only a name may wrap."""
    columns = (
        "",
        "slots",
        "in\nuse",
        "run",
        "step,\nms",
        "sus-\ntained",
        "±",
        *(["good-\nput"] if limited else []),
        "roof-\nline",
        *(["price\n10^6"] if found.gpu.price_per_hour is not None else []),
    )
    table = report.number_table(*columns, wrap_names=True, padding=(0, 1) if width >= 80 else 0)
    for plan in found.plans:
        if plan.served is None:
            table.add_row(plan.name, *["-"] * (len(columns) - 1))
            continue
        steady = plan.served.steady
        table.add_row(
            plan.name,
            f"{steady.slots:,.0f}",
            f"{steady.outcome.shares.occupancy:.1%}",
            f"{steady.outcome.running_mean:,.1f}",
            f"{1000 * steady.step_seconds:.1f}",
            report.rate_words(steady.sustained_rate),
            report.rate_words(steady.half_width, steady.sustained_rate),
            *([report.rate_words(plan.rate) if plan.rate else "none"] if limited else []),
            report.rate_words(steady.roofline),
            *([report.price_words(plan.served.price)] if found.gpu.price_per_hour is not None else []),
        )
    return table


def _gain(found: Assessment) -> str:
    gains = ", ".join(
        f"{gain:.3g}x {name}" if gain < float("inf") else f"{name} holds none" for name, gain in found.gain.items()
    )
    shared = found.with_prefixes
    paged = found.plans[PAGED].rate
    if shared is not None and shared.steady is not None and paged:
        known = f"{shared.steady.outcome.hit_rate:.0%} of the prompts' tokens are in it"
        gains += f"; a prefix cache makes it {shared.rate / paged:.3g} times as many ({known})"
    return (
        f"Requests per second, paged: {gains}. If every sequence were as long as the longest at the same moment, "
        f"{found.sequences_at_worst:,} would fit in blocks; on average {found.fit:,} do."
    )


def _batches(found: Assessment) -> Table:
    """Where the curve of the rate bends."""
    priced = found.gpu.price_per_hour is not None
    price = ["price\n10^6"] if priced else []
    table = report.number_table("sequences", "a step, ms", "requests/s\nat most", "of the\nmost", *price)
    most = found.batches[-1]
    place = next(n for n, each in enumerate(found.batches) if each.sequences == found.advised)
    around = found.batches[max(0, place - 4) : place + 4]
    for each in around if most in around else (*around, most):
        cells = (f"{1000 * each.step_seconds:.1f}", report.rate_words(each.rate), f"{each.rate / most.rate:.0%}")
        price = [report.price_words(each.price)] if priced else []
        table.add_row(f"{each.sequences:,}", *cells, *price, style="bold" if each.sequences == found.advised else "")
    return table


def _sequence_advice(found: Assessment, limits: Limits) -> str:
    tpot, share = f"{1000 * found.advised_tpot:.0f} ms", f"{100 * limits.share:.6g} %"
    if limits.tpot is None:
        return (
            f"By the roofline; memory has room for {found.fit:,}. {found.advised:,} sequences give {BEND:.0%} of the "
            f"most: there the curve bends, and more sequences lengthen the step more than they help. So, {share} of "
            f"the requests get a token in {tpot} (simulated); a limit (--tpot) chooses the number by that."
        )
    if found.advised_tpot > limits.tpot:
        return (
            f"Not even {found.advised:,} keeps --tpot {limits.tpot:g} for {share} of the requests: {tpot} (simulated)."
        )
    return (
        f"By the roofline; memory has room for {found.fit:,}. {found.advised:,} keep --tpot {limits.tpot:g}: {share} "
        f"of the requests get a token in {tpot} (simulated)."
    )


def _block_sizes(found: Assessment) -> Table:
    table = report.number_table("block\nsize", "slots\nempty", "table", "K in one\npiece", "swap\nout, in")
    for each in found.block_sizes:
        sizes = _size(each.table_bytes), _size(each.run_bytes)
        cells = (f"{each.block_size:>5}", f"{each.waste:.1%}", *sizes, f"{1000 * each.swap_seconds:.1f} ms")
        table.add_row(*cells, style="bold" if each.block_size == found.block_size else "")
    return table


def _block_advice(found: Assessment) -> str:
    advised = next(each for each in found.block_sizes if each.block_size == found.block_size)
    if advised.waste <= WASTE_LIMIT:
        why = f"the largest that leaves at most {WASTE_LIMIT:.0%} of the slots empty"
    else:
        why = f"smaller blocks cost kernels time, larger ones leave more than {advised.waste:.1%} of the slots empty"
    kv = _size(round(found.mean_length) * found.model.kv_bytes_per_token)
    return (
        f"{found.block_size}: {why}. Its table is {_size(advised.table_bytes)} beside {kv} of K and V; what a kernel "
        f"feels is the jump after each piece (paged-ref bench kernels measures that here). Larger blocks are fewer "
        f"copies to swap; of a common beginning, only whole blocks are shared."
    )


def _swap_advice(found: Assessment) -> str:
    length, again = round(found.mean_length), f"{1000 * found.recompute_seconds:.1f} ms"
    if found.swap_from is None:
        when = "at every length up to the model's context, computing again is the faster on this link"
    elif found.swap_from <= found.block_size:
        when = "swapping is the faster at every length on this link"
    else:
        when = f"swapping is the faster from {found.swap_from:,} tokens on, on this link"
    return (
        f"To compute a sequence of {length:,} tokens again takes {again}. With this block size, {when}, each block of "
        f"each layer's K and V copied by itself."
    )


def picture(found: Assessment) -> str:
    """Where the memory is, and the step time over the rate, as SVG."""
    title = f"{found.model.name} on {found.gpu.name}: K/V memory while requests wait, and the time of a step"
    bars = bars_of(plan.steady for plan in found.plans if plan.steady)
    line = Line("paged, by the roofline", [(each.rate, each.step_seconds) for each in found.batches])
    y_most = round_up(max(y for _, y in line.points))
    return svg(title, bars, [line], y_most, "requests per second, at most", "seconds of a step", None)


def print_known(console: Console) -> None:
    """The tables of models and GPUs. In a narrow window the columns stand closer."""
    wide = console.width >= 80
    style: dict[str, Any] = {"padding": (0, 1) if wide else 0, "show_edge": wide}
    table = report.number_table("", *MODEL_COLUMNS, title="Known models", **style)
    for model in MODELS.values():
        sizes = (model.num_layers, model.num_heads, model.num_kv_heads, model.max_context)
        cells = f"{model.num_parameters / 1e9:.2f}", *map(str, sizes), f"{model.kv_bytes_per_token:,}"
        table.add_row(model.name, *cells)
    console.print(table)
    table = report.number_table("", *GPU_COLUMNS, title="Known GPUs, as published", **style)
    for gpu in GPUS.values():
        rates = f"{gpu.bandwidth / 1e9:,.0f} GB/s", f"{gpu.flops / 1e12:,.1f} TFLOPS", f"{gpu.link / 1e9:.0f} GB/s"
        table.add_row(gpu.name, f"{gpu.memory_bytes // GIB} GiB", *rates)
    console.print(table)


def _size(num_bytes: int) -> str:
    return size_of(num_bytes, least=1)
