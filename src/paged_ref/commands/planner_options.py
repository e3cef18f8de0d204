"""What `compare`, `assess` and `paper` have in common on the command line: a model, GPUs, a trace, limits on latency,
workers, and the files that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..planner.hardware import GPU, gpu_named, several
from ..planner.metrics import Limits
from ..planner.model_config import ModelSpec
from ..planner.models import ByHand, model_named, with_windows
from ..planner.setup import Setup
from ..planner.trace_files import FORMS, trace_named
from ..planner.traces import DRAWN, RequestTrace
from ..planner.workers import Workers
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import write_json, write_text
from ..views.common.program import program
from .report_text import NARROWEST, write_csv


def trace_options(parser: options.Options, default: str | None, help: str) -> None:
    """`help` has {} where the forms of a file stand."""
    parser.add_argument("--trace", default=default, metavar="FILE", help=help.format(FORMS))
    number = f"of the trace so many, spread over a longer one (default {DRAWN}; 0: all)"
    options.integer(parser, "--requests", DRAWN, number, least=0)
    text = "a row of the trace that cannot be read ends the command, or is left out and counted (default stop)"
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help=text)


def trace_of_options(args: argparse.Namespace) -> RequestTrace:
    """The trace of --trace, --requests, --on-bad-row and, where the command has it, --seed."""
    return trace_named(args.trace, args.requests, getattr(args, "seed", 0), skip_bad_rows=args.on_bad_row == "skip")


def server_options(parser: options.Options, model: str, gpu: str) -> None:
    """The model, the GPUs and what their scheduler may do; `model` and `gpu` are the defaults, in words."""
    text = f"a name (see {program()} assess --list) or a Hugging Face directory (default {model})"
    parser.add_argument("--model", metavar="NAME", help=text)
    text = "by hand, in place of the model's: bytes of K and V of a token, in all layers"
    options.integer(parser, "--kv-bytes-per-token", None, text)
    options.positive(parser, "--weights", None, "by hand: parameters, as in 70e9", metavar="N")
    options.positive(parser, "--active-weights", None, "by hand: of these, those that a token meets", metavar="N")
    options.integer(parser, "--layers", None, "by hand")
    text = "of the weights (default: as published, mostly 16)"
    parser.add_argument("--weight-bits", type=int, choices=(4, 8, 16, 32), help=text)
    parser.add_argument("--kv-bits", type=int, choices=(8, 16, 32), help="of K and V (default 16)")
    text = f"a name (see {program()} assess --list), or auto: that of this machine (default {gpu})"
    parser.add_argument("--gpu", metavar="NAME", help=text)
    options.integer(parser, "--num-gpus", 1, "GPUs that share each layer", least=None)
    text = "of one GPU, in any currency: adds the price of 10^6 output tokens"
    options.positive(parser, "--price-per-hour", None, text, metavar="P")
    options.integer(parser, "--max-model-len", None, "longest request (default: the model's context)", least=None)
    options.integer(parser, "--max-batch-tokens", 2048, "in a step", least=None)
    options.integer(parser, "--max-batch-seqs", 256, "running at the same time", least=None)


def model_of(args: argparse.Namespace, default: str) -> ModelSpec:
    """The model of these options. Raises ValueError."""
    if args.kv_bits is not None and args.kv_bytes_per_token is not None:
        raise ValueError(f"--kv-bits is {args.kv_bits}; --kv-bytes-per-token {args.kv_bytes_per_token} says the size")
    by_hand = ByHand(args.kv_bytes_per_token, args.weights, args.active_weights, args.layers)
    if args.model is None and by_hand:
        model = by_hand.model()
    else:
        model = by_hand.change(model_named(default if args.model is None else args.model))
    if args.max_model_len is not None and not 2 <= args.max_model_len <= model.max_context:
        needed = f"2 to the {model.max_context} of {model.name}'s context is allowed"
        raise ValueError(f"--max-model-len is {args.max_model_len}; {needed}")
    return replace(model, weight_bits=args.weight_bits or model.weight_bits, kv_bits=args.kv_bits or model.kv_bits)


def gpu_of(args: argparse.Namespace, model: ModelSpec, default: str) -> GPU:
    """The GPUs of these options. Raises ValueError."""
    if args.num_gpus < 1 or model.num_heads % args.num_gpus:
        raise ValueError(f"--num-gpus is {args.num_gpus}; a divisor of the {model.num_heads} heads is needed")
    gpu = replace(gpu_named(default if args.gpu is None else args.gpu), price_per_hour=args.price_per_hour)
    return several(gpu, args.num_gpus)


def setup_of(args: argparse.Namespace, gpu: GPU, model: ModelSpec, trace: RequestTrace) -> Setup:
    """Paged memory, for these requests: what all ways to manage the memory have in common."""
    return Setup(
        "paged", gpu, with_windows(model, trace.requests), kv_tokens=getattr(args, "kv_tokens", None),
        max_model_len=args.max_model_len, max_batch_tokens=args.max_batch_tokens, max_batch_seqs=args.max_batch_seqs,
    )  # fmt: skip


def file_options(parser: options.Options, *, page: bool = True) -> None:
    options.json_output(parser, "write all numbers here; -: print only them", stdout=True)
    options.output(parser, "--csv", "write the rows of the tables here")
    options.svg_output(parser)
    if page:
        options.output(parser, "--html", "write a report on one page here, which needs no other file")


def report_console(args: argparse.Namespace, least: int = NARROWEST) -> Console:
    """Where the report goes: at least so wide that no number is cut, and nowhere with `--json -`."""
    return Console(highlight=False, width=max(Console().width, least), quiet=str(args.json) == "-")


def write_files(
    args: argparse.Namespace,
    numbers: Callable[[], Any],
    rows: Sequence[Mapping[str, Any]],
    svg: Callable[[], str],
    html: Callable[[], str] = str,
) -> None:
    """Each file that the command line asks for; with `--json -` the numbers on standard output. Raises ValueError where
    one cannot be written."""
    if str(args.json) == "-":
        print(json.dumps(numbers(), indent=1))
    elif args.json:
        write_json(args.json, numbers())
    if args.csv:
        write_csv(args.csv, rows)
    if args.svg:
        write_text(args.svg, svg())
    if getattr(args, "html", None):
        write_text(args.html, html())


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
