"""What `compare`, `assess` and `paper` have in common on the command line: a trace, limits on latency, and workers."""

from __future__ import annotations

import argparse

from ..planner.metrics import Limits
from ..planner.trace_files import trace_named
from ..planner.traces import RequestTrace
from ..planner.workers import Workers
from ..views.common import options


def bad_row_option(parser: options.Options) -> None:
    text = "a row of the trace that cannot be read ends the command, or is left out and counted (default stop)"
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help=text)


def trace_of_options(args: argparse.Namespace) -> RequestTrace:
    """The trace of --trace, --requests, --on-bad-row and, where the command has it, --seed."""
    return trace_named(args.trace, args.requests, getattr(args, "seed", 0), skip_bad_rows=args.on_bad_row == "skip")


def limit_options(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits on latency; with one, the rate is goodput: as many as meet them")
    options.positive(limits, "--ttft", None, "seconds to the first token", metavar="S")
    options.positive(limits, "--tpot", None, "seconds for each token after the first", metavar="S")
    options.positive(limits, "--latency", None, "seconds in all for each output token", metavar="S")
    options.positive(limits, "--share", 99.0, "percent of the requests that must meet them", metavar="P")


def limits_of(args: argparse.Namespace) -> Limits:
    if args.share > 100:
        raise ValueError(f"--share is {args.share}; at most 100 percent is possible")
    return Limits(args.ttft, args.tpot, args.latency, args.share / 100)


def worker_options(parser: argparse.ArgumentParser) -> None:
    options.jobs(parser)
    text = "run on the workers of this Dask scheduler instead, as in tcp://host:8786"
    parser.add_argument("--cluster", metavar="ADDRESS", help=text)


def workers_of(args: argparse.Namespace) -> Workers:
    return Workers(args.jobs, args.cluster)
