"""`paged-ref compare`: the article's table of managers, measured on real or drawn requests."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench import kernels as bench_kernels
from ..bench import memory as bench_memory
from ..bench.batch import Batch
from ..bench.shapes import Shape
from ..extras.managers import ManagerName
from ..kernels import why_not
from ..planner.comparison import Checked, able, check, setups, small
from ..planner.metrics import Limits
from ..planner.roofline import explain
from ..planner.setup import Setup
from ..planner.source_lines import lines_of
from ..planner.sweep import Curve, curves_of, num_runs
from ..planner.traces import RequestTrace, scaled
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import recording
from . import planner_options as shared
from .compare_plots import picture
from .compare_report import MeasuredCost, results, setting, title_of, with_the_model
from .html_report import page
from .report_text import print_parts, print_title

TECHNIQUES: tuple[ManagerName, ...] = ("standard", "swapping", "paged")  # in the order of the article
DEFAULT_MODEL, DEFAULT_GPU = "OPT-13B", "A100-40GB"  # the paper's
BENCH_SEQUENCES, BENCH_STEPS, BENCH_ROUNDS = 64, 64, 31
KERNEL = Shape("Llama-3-8B", 4, 1024, dtype="float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    trace = parser.add_argument_group("requests")
    shared.trace_options(trace, "sharegpt", "{}; or sharegpt, alpaca: drawn to the paper's means (default sharegpt)")
    options.positive(trace, "--scale", 1.0, "all lengths times X")
    options.seed(trace, help="of drawn lengths and times")
    server = parser.add_argument_group("server")
    shared.server_options(server, DEFAULT_MODEL, DEFAULT_GPU)
    options.integer(server, "--kv-tokens", None, "KV budget (default: what the weights leave)", least=2)
    options.integer(server, "--block-sizes", [8, 16, 128], nargs="+")
    shared.limit_options(parser)
    parser.add_argument("--run", action="store_true", help="also run the embedded model on the shortened requests")
    options.record_output(parser, "with --run: write those runs as JSON lines")
    shared.worker_options(parser)
    shared.file_options(parser)


def main(args: argparse.Namespace) -> int:
    if args.record is not None and not args.run:
        raise ValueError(f"--record {args.record} writes runs of the embedded model; --run makes them")
    trace = shared.trace_of_options(args)
    if args.scale != 1.0:
        trace = scaled(trace, args.scale)
    model = shared.model_of(args, DEFAULT_MODEL)
    base = shared.setup_of(args, shared.gpu_of(args, model, DEFAULT_GPU), model, trace)
    rows = setups(base, list(dict.fromkeys(args.block_sizes)))
    for row in rows:
        row.make_scheduler(row.make_manager())  # refuses an impossible setup before anything runs
    rows, left_out = able(rows, trace)
    console, title = shared.report_console(args), title_of(base)
    limits = shared.limits_of(args)
    print_title(console, title)
    before = [*setting(base, trace), *left_out]
    print_parts(console, before)
    found, cost, checked = _measure(args, rows, trace, limits)
    print_parts(console, results(found, cost, trace))
    if args.run:
        print_parts(console, with_the_model(small(trace), checked))
    shared.write_files(
        args,
        lambda: as_json(base, trace, limits, found, cost, checked) | {"left_out": left_out},
        [row.to_json() for row in found],
        lambda: picture(found),
        lambda: page(title, base, [*before, *results(found, cost, trace)]),
    )
    return 0 if all(each.same for each in checked) else 1


def _measure(
    args: argparse.Namespace, rows: list[Setup], trace: RequestTrace, limits: Limits
) -> tuple[list[Curve], MeasuredCost, list[Checked]]:
    """The rows, simulated; the cost, timed; and with --run the embedded model on the first requests, shortened."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    checked: list[Checked] = []
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    with recording(args.record) as log, bars as progress:
        task = progress.add_task("simulating", total=num_runs(len(rows), limits))
        found = curves_of(rows, trace, limits, workers=shared.workers_of(args), on_run=lambda: progress.advance(task))
        task = progress.add_task("timing bookkeeping and kernels", total=2)
        cost = _cost(lambda: progress.advance(task))
        if args.run:
            task = progress.add_task("running the embedded model", total=len(rows))
            checked = check(rows, small(trace), on_run=lambda _: progress.advance(task), log=log)
    return found, cost, checked


def _cost(done: Callable[[], object]) -> MeasuredCost:
    """What bookkeeping and the paged kernel take on this machine: real code, timed now."""
    steps = {each.name: each.measured for each in bench_memory.scheduling(BENCH_SEQUENCES, BENCH_STEPS)}
    done()
    batch = Batch(KERNEL, np)
    backend = "cpu-simd" if why_not("cpu-simd") is None else "reference"
    contenders = {bench_kernels.PAGED: batch.paged(backend)[0], bench_kernels.CONTIGUOUS: batch.contiguous(backend)[0]}
    for run in contenders.values():
        run()  # compiles
    seconds = bench_kernels.measure(contenders, BENCH_ROUNDS)
    done()
    return MeasuredCost(
        num_seqs=BENCH_SEQUENCES,
        micros={name: steps[f"scheduling step, {name}"] for name in TECHNIQUES},
        kernel_ratio=seconds[bench_kernels.PAGED] / seconds[bench_kernels.CONTIGUOUS],
    )


def as_json(
    base: Setup, trace: RequestTrace, limits: Limits, rows: list[Curve], cost: MeasuredCost, checked: list[Checked]
) -> dict[str, Any]:
    return {
        "gpu": base.gpu.name,
        "price_per_hour": base.gpu.price_per_hour,
        "model": base.model.name,
        "kv_tokens": base.num_slots,
        "kv_bytes_per_token": base.model.kv_bytes_per_token,
        "constants": {name: value for name, value, _ in explain(base.constants)},
        "trace": trace.describe(),
        "notes": trace.notes,
        "limits": limits.describe() if limits else None,
        "rows": [row.to_json() for row in rows],
        "cost": {**asdict(cost), "lines": {name: lines_of(replace(base, manager=name)) for name in TECHNIQUES}},
        "run": [
            {"label": each.label, "steps": each.steps, "same": each.same, "tokens_of_used": each.ran.occupancy}
            for each in checked
        ],
    }
