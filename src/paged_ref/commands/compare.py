"""`paged-ref compare`: the article's table of managers, measured on real or drawn requests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench import kernels as bench_kernels
from ..bench import memory as bench_memory
from ..bench.batch import Batch
from ..bench.shapes import Shape
from ..extras.managers import ManagerName
from ..planner.comparison import Checked, ComparisonRow, check, row_of, setups, small
from ..planner.hardware import gpu_named
from ..planner.models import model_named
from ..planner.roofline import explain
from ..planner.setup import Setup
from ..planner.source_lines import lines_of
from ..planner.sweep import RUNS_OF_A_CURVE, checked_jobs, curves_of
from ..planner.trace_files import read_trace
from ..planner.traces import MEANS, RequestTrace, first, generated, scaled
from ..timeline.events import Log, write_events
from ..views.common.plots import write_svg
from .compare_plots import picture
from .compare_report import MeasuredCost, print_checked, print_report, print_setting
from .recording import record_to

NARROWEST = 78  # columns: a narrower terminal wraps the lines, so that no number is cut
BOUND = 0.2  # seconds per token: a person reads four words a second, about five tokens
REQUESTS = 1000
TECHNIQUES: tuple[ManagerName, ...] = ("standard", "swapping", "paged")  # in the order of the article
BENCH_SEQUENCES, BENCH_STEPS, BENCH_ROUNDS = 64, 64, 31
KERNEL = Shape("Llama-3-8B", 4, 1024, dtype="float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    trace = parser.add_argument_group("requests")
    trace.add_argument(
        "--trace", default="sharegpt", metavar="FILE",
        help="Azure CSV, Mooncake JSON lines, ShareGPT lengths or two columns, gzip or not; or sharegpt, alpaca: "
        "drawn to the paper's means (default sharegpt)",
    )  # fmt: skip
    trace.add_argument(
        "--requests", type=int, default=REQUESTS, metavar="N", help=f"the first N (default {REQUESTS}; 0: all)"
    )
    trace.add_argument("--scale", type=float, default=1.0, metavar="X", help="all lengths times X")
    trace.add_argument("--seed", type=int, default=0, metavar="N", help="of drawn lengths and times (default 0)")
    server = parser.add_argument_group("server")
    server.add_argument("--model", default="OPT-13B", metavar="NAME", help="name or directory (default OPT-13B)")
    server.add_argument("--gpu", default="A100-40GB", metavar="NAME", help="or auto (default A100-40GB)")
    server.add_argument("--kv-tokens", type=int, metavar="N", help="KV budget (default: what the weights leave)")
    server.add_argument("--max-model-len", type=int, metavar="N", help="longest request (default: model's context)")
    server.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 128], metavar="N", help="8 16 128")
    server.add_argument("--max-batch-tokens", type=int, default=2048, metavar="N", help="in a step (default 2048)")
    server.add_argument(
        "--max-batch-seqs", type=int, default=256, metavar="N", help="running at the same time (default 256)"
    )
    parser.add_argument(
        "--latency", type=float, default=BOUND, metavar="S",
        help=f"bound on the mean latency per output token, in seconds (default {BOUND})",
    )  # fmt: skip
    parser.add_argument("--run", action="store_true", help="also run the embedded model on the shortened requests")
    parser.add_argument("--record", type=Path, metavar="FILE", help="with --run: write those runs as JSON lines")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plots here")


def main(args: argparse.Namespace) -> int:
    _refuse(args)
    trace, base = trace_of(args), setup_of(args)
    rows = setups(base, args.block_sizes)
    for row in rows:
        row.make_scheduler(row.make_manager())  # refuses an impossible setup before anything runs
    console = Console(highlight=False, width=max(Console().width, NARROWEST))
    print_setting(console, base, trace, args.latency)
    found, cost, checked = _measure(args, rows, trace)
    print_report(console, found, cost)
    if args.run:
        print_checked(console, small(trace), checked)
    if args.json:
        numbers = as_json(base, trace, args.latency, found, cost, checked)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if args.svg:
        write_svg(args.svg, picture(found))
    return 0 if all(each.same for each in checked) else 1


def _refuse(args: argparse.Namespace) -> None:
    """Raise ValueError for options that could only fail after a minute."""
    for name in ("json", "svg"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{name} {path} cannot be written: there is no directory {path.parent}")
    if args.record is not None and not args.run:
        raise ValueError(f"--record {args.record} writes runs of the embedded model; --run makes them")
    if not 0 < args.latency < float("inf"):
        raise ValueError(f"--latency is {args.latency}; a number of seconds above 0 is needed")
    checked_jobs(args.jobs)


def _measure(
    args: argparse.Namespace, rows: list[Setup], trace: RequestTrace
) -> tuple[list[ComparisonRow], MeasuredCost, list[Checked]]:
    """The rows, simulated; the cost, timed; and with --run the embedded model on the first requests, shortened."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    checked: list[Checked] = []
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    with record_to(args.record) as file, bars as progress:
        task = progress.add_task("timing bookkeeping and kernels", total=2)
        cost = _cost(lambda: progress.advance(task))
        task = progress.add_task("simulating", total=len(rows) * RUNS_OF_A_CURVE)
        curves = curves_of(rows, trace, args.latency, num_jobs=args.jobs, on_run=lambda _: progress.advance(task))
        progress.update(task, completed=len(rows) * RUNS_OF_A_CURVE)
        found = [row_of(curve, trace) for curve in curves]
        if args.run:
            task = progress.add_task("running the embedded model", total=len(rows))
            log: Log | None = None if file is None else lambda event: write_events([event], file)
            checked = check(rows, small(trace), on_run=lambda _: progress.advance(task), log=log)
    return found, cost, checked


def trace_of(args: argparse.Namespace) -> RequestTrace:
    if args.requests < 0:
        raise ValueError(f"--requests is {args.requests}; at least 1 is needed, or 0 for all")
    if args.trace in MEANS:
        trace = generated(args.trace, args.requests or REQUESTS, args.seed)
    else:
        trace = read_trace(args.trace)
    if args.requests:
        trace = first(trace, args.requests)
    return trace if args.scale == 1.0 else scaled(trace, args.scale)


def setup_of(args: argparse.Namespace) -> Setup:
    """The part that all rows have in common. Raises ValueError."""
    model, gpu = model_named(args.model), gpu_named(args.gpu)
    for name in ("kv_tokens", "max_model_len"):
        value = getattr(args, name)
        if value is not None and value < 2:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least 2 is needed")
    if args.max_model_len is not None and args.max_model_len > model.max_context:
        raise ValueError(f"--max-model-len is {args.max_model_len}; {model.name}'s context is {model.max_context}")
    for size in args.block_sizes:
        if size < 1:
            raise ValueError(f"--block-sizes holds {size}; at least 1 is needed")
    return Setup(
        "paged", gpu, model, kv_tokens=args.kv_tokens, max_model_len=args.max_model_len,
        max_batch_tokens=args.max_batch_tokens, max_batch_seqs=args.max_batch_seqs,
    )  # fmt: skip


def _cost(done: Callable[[], object]) -> MeasuredCost:
    """What bookkeeping and the paged kernel take on this machine: real code, timed now."""
    steps = {each.name: each.measured for each in bench_memory.scheduling(BENCH_SEQUENCES, BENCH_STEPS)}
    done()
    batch = Batch(KERNEL, np)
    contenders = {
        bench_kernels.PAGED: batch.paged("cpu-simd")[0],
        bench_kernels.CONTIGUOUS: batch.contiguous("cpu-simd")[0],
    }
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
    base: Setup,
    trace: RequestTrace,
    bound: float,
    rows: list[ComparisonRow],
    cost: MeasuredCost,
    checked: list[Checked],
) -> dict[str, Any]:
    return {
        "gpu": base.gpu.name,
        "model": base.model.name,
        "kv_tokens": base.num_slots,
        "kv_bytes_per_token": base.model.kv_bytes_per_token,
        "constants": {name: value for name, value, _ in explain(base.constants)},
        "trace": trace.describe(),
        "notes": trace.notes,
        "latency_bound": bound,
        "rows": [row.to_json() for row in rows],
        "cost": {**asdict(cost), "lines": {name: lines_of(replace(base, manager=name)) for name in TECHNIQUES}},
        "run": [
            {"label": each.label, "steps": each.steps, "same": each.same, "tokens_of_used": each.ran.occupancy}
            for each in checked
        ],
    }
