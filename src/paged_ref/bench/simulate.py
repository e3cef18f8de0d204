"""`paged-ref bench simulate`: how fast a trace goes through the real scheduler and managers, in one process.

Each manager takes the whole trace in turn. CPU time is counted, so that a busy neighbour matters less.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import process_time
from typing import Any

from ..planner.hardware import gpu_named
from ..planner.models import model_named
from ..planner.setup import Setup
from ..planner.simulate import Simulation
from ..planner.trace_files import trace_named
from ..planner.traces import DRAWN, at_rate
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .results import table_of, write_results

RATE = 2.0  # requests per second, where the trace has no times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    trace = "a trace as compare takes it (default sharegpt)"
    parser.add_argument("--trace", default="sharegpt", metavar="FILE", help=trace)
    options.integer(parser, "--requests", 0, f"so many (default: all, or {DRAWN})", least=0)
    parser.add_argument("--model", default="OPT-13B", metavar="NAME", help="default OPT-13B")
    parser.add_argument("--gpu", default="A100-40GB", metavar="NAME", help="default A100-40GB")
    parser.add_argument("--plain", action="store_true", help="also step by step, without fast forward")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    trace = trace_named(args.trace, args.requests)
    if not trace.timed:
        trace = at_rate(trace, RATE)
    paged = Setup("paged", gpu_named(args.gpu), model_named(args.model))
    setups = [
        paged,
        replace(paged, label="standard exact", manager="standard", reserve="exact"),
        replace(paged, label="swapping", manager="swapping", preemption="swap"),
    ]
    results: list[dict[str, Any]] = []
    for setup in setups:
        for skip in (True, False) if args.plain else (True,):
            began = process_time()
            outcome = Simulation(setup, trace, skip=skip).run()
            seconds, tokens = process_time() - began, outcome.output_tokens
            name = setup.label if skip else f"{setup.label}, every step"
            numbers = {"seconds": seconds, "steps": outcome.steps, "output_tokens": tokens}
            results.append({"name": name, **numbers, "tokens_per_second": tokens / seconds})
    console = Console(highlight=False)
    console.print(f"{trace.describe()}; {describe_device()}")
    rows = (
        (each["name"], f"{each['seconds']:.2f}", f"{each['steps']:,}", f"{each['tokens_per_second']:,.0f}")
        for each in results
    )
    console.print(table_of(("", "CPU seconds", "steps", "output tokens/s"), rows))
    write_results(args.json, trace=trace.describe(), results=results)
    return 0
