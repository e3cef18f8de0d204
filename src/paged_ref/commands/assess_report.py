"""What `paged-ref assess` prints: an assessment in words and tables."""

from __future__ import annotations

from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..extras.plain_text import plain
from ..planner.assess import WASTE_LIMIT, Assessment
from ..planner.hardware import GIB, GPUS
from ..planner.models import MODELS
from ..planner.settings import servers
from ..views.common.canvas import count, size_of
from ..views.common.console import Console
from .report_text import number_table, print_constants, print_heading, print_paragraph, print_rows

_WHY = {
    "capacity": "The weights are read, and a step begins, once for all sequences of a batch: more sequences make each "
    "one cheaper. What is missing is memory. Paging gives it; K and V in 8 bits or a larger GPU give more.",
    "bandwidth": "Each sequence adds the reading of its K and V to every step. Room for more sequences, which is what "
    "paging gives, adds less and less; fewer bytes a token (grouped queries, 8 bits) or a faster memory help more.",
    "compute": "Prompts keep the arithmetic busy. Room for more sequences, which is what paging gives, adds little; "
    "a prefix cache for a common beginning of the prompts, or a GPU with more arithmetic, helps more.",
}

MODEL_COLUMNS = ("params\n(10^9)", "layers", "heads", "KV\nheads", "context", "K, V\nbytes")
GPU_COLUMNS = ("memory", "bandwidth", "fp16,\ndense", "link,\none way")


def print_report(console: Console, found: Assessment, source: str) -> None:
    gpu, model = found.gpu, found.model
    console.print(Text.assemble((plain(model.name), "bold"), " on ", (gpu.name, "bold"), f": {plain(source)}."))
    print_paragraph(
        console, f"A sequence may have {found.max_model_len:,} tokens; `standard max` reserves this for each."
    )
    if found.num_refused:
        print_paragraph(console, f"Left out: {count(found.num_refused, 'longer request')}.")
    print_heading(console, "Memory")
    share = f"{found.constants.memory_share:.0%} of {_size(gpu.memory_bytes)}, less the weights"
    rows = [
        ("K, V a token", model.kv_arithmetic),
        (f"of {found.longest:,} tokens", _size(found.longest * model.kv_bytes_per_token)),
        ("weights", f"{model.num_parameters:,} x {model.weight_bits} bits = {_size(model.weight_bytes)}"),
        ("left for K, V", f"{share} = {_size(found.kv_bytes)} = {found.num_tokens:,} tokens"),
    ]
    print_rows(console, rows)
    if model.num_windowed_layers:
        print_paragraph(
            console, f"{model.num_windowed_layers} layers see only a window; their K and V are counted in full."
        )
    if gpu.count > 1:
        print_paragraph(console, "The traffic between the GPUs is not counted: the times are too short by it.")
    print_heading(console, "How many sequences fit, and how fast")
    console.print(_plans(found, console.width))
    print_paragraph(console, _gain(found))
    print_heading(console, f"The bottleneck: {found.bottleneck}")
    print_paragraph(console, f"{_roofline(found)} {_WHY[found.bottleneck]}")
    print_heading(console, f"Block size: {found.block_size}, and swap or compute again")
    console.print(_block_sizes(found))
    print_paragraph(console, _block_advice(found))
    print_paragraph(console, _swap_advice(found))
    print_heading(console, "The same elsewhere")
    for server in servers(found):
        console.print(Text.assemble((f" {server.name}", "bold"), f" (looked at: {server.version})"))
        console.print(f"   {server.command}", soft_wrap=True)  # one line, to be copied
        for sentence in server.supports:
            console.print(Padding(f"- {sentence}", (0, 0, 0, 3)))
    print_heading(console, "Assumed, beside the datasheet")
    print_constants(console, found.constants)
    print_paragraph(
        console, "paged-ref compare runs the real managers over real arrivals: waiting, holes, preemptions."
    )


def _plans(found: Assessment, width: int) -> Table:
    """Numbers are never cut: in a narrow window the columns stand closer, and only a name may wrap."""
    columns = ("", "slots", "in\nuse", "fit", "step,\nms", "tokens\n/s", "req\n/s")
    table = number_table(*columns, wrap_names=True, padding=(0, 1) if width >= 80 else 0)
    for plan in found.plans:
        speeds = [
            f"{1000 * plan.step.seconds:.1f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.requests_per_second:.2f}",
        ]
        cells = speeds if plan.sequences else ["-"] * 3
        table.add_row(plan.name, f"{plan.slots:,.0f}", f"{plan.used:.1%}", f"{plan.sequences:,}", *cells)
    return table


def _gain(found: Assessment) -> str:
    gains = ", ".join(
        f"{gain:.3g}x {name}" if gain < float("inf") else f"{name} holds none" for name, gain in found.gain.items()
    )
    return (
        f"Requests per second, paged: {gains}. Memory is full all the time; as many begin as end. If every sequence "
        f"were as long as the longest at the same moment, {found.sequences_at_worst:,} would fit in blocks."
    )


def _roofline(found: Assessment) -> str:
    """The two sides of a step with paged memory, and which side counts."""
    plan, step = found.paged, found.paged.step
    weights, kv, compute, overhead = (f"{1000 * seconds:.1f} ms" for seconds in step)
    reads = step.weights + step.kv >= step.compute
    return (
        f"Paged, a step decodes {plan.sequences:,} sequences and computes {plan.prompt_tokens:,.0f} tokens of prompts. "
        f"Reading takes {weights} for the weights and {kv} for K and V, arithmetic {compute}; the slower of the two "
        f"counts, which is {'reading' if reads else 'arithmetic'}, and {overhead} of overhead."
    )


def _block_sizes(found: Assessment) -> Table:
    table = number_table("block\nsize", "slots\nempty", "table", "K in one\npiece", "swap\nout, in")
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


def print_known(console: Console) -> None:
    """The tables of models and GPUs. In a narrow window the columns stand closer."""
    wide = console.width >= 80
    style: dict[str, Any] = {"padding": (0, 1) if wide else 0, "show_edge": wide}
    table = number_table("", *MODEL_COLUMNS, title="Known models", **style)
    for model in MODELS.values():
        sizes = (model.num_layers, model.num_heads, model.num_kv_heads, model.max_context)
        cells = f"{model.num_parameters / 1e9:.2f}", *map(str, sizes), f"{model.kv_bytes_per_token:,}"
        table.add_row(model.name, *cells)
    console.print(table)
    table = number_table("", *GPU_COLUMNS, title="Known GPUs, as published", **style)
    for gpu in GPUS.values():
        rates = f"{gpu.bandwidth / 1e9:,.0f} GB/s", f"{gpu.flops / 1e12:,.1f} TFLOPS", f"{gpu.link / 1e9:.0f} GB/s"
        table.add_row(gpu.name, f"{gpu.memory_bytes // GIB} GiB", *rates)
    console.print(table)


def _size(num_bytes: int) -> str:
    return size_of(num_bytes, least=1)
