"""What `compare`, `assess` and `paper` have in common on the command line: a model, GPUs, a trace,
limits on latency, and workers."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..planner.hardware import GPU, gpu_named, several
from ..planner.metrics import Limits
from ..planner.model_config import ModelSpec
from ..planner.models import ByHand, model_named
from ..planner.trace_files import trace_named
from ..planner.traces import RequestTrace
from ..planner.workers import Workers
from ..views.common import options
from ..views.common.program import program


def bad_row_option(parser: options.Options) -> None:
    text = "a row of the trace that cannot be read ends the command, or is left out and counted (default stop)"
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help=text)


def trace_of_options(args: argparse.Namespace) -> RequestTrace:
    """The trace of --trace, --requests, --on-bad-row and, where the command has it, --seed."""
    return trace_named(args.trace, args.requests, getattr(args, "seed", 0), skip_bad_rows=args.on_bad_row == "skip")


def model_options(parser: options.Options, default: str) -> None:
    text = f"a name (see {program()} assess --list) or a Hugging Face directory (default {default})"
    parser.add_argument("--model", metavar="NAME", help=text)
    text = "by hand, in place of the model's: bytes of K and V of a token, in all layers"
    options.integer(parser, "--kv-bytes-per-token", None, text)
    options.positive(parser, "--weights", None, "by hand: parameters, as in 70e9", metavar="N")
    options.positive(parser, "--active-weights", None, "by hand: of these, those that a token meets", metavar="N")
    options.integer(parser, "--layers", None, "by hand")
    text = "of the weights (default: as published, mostly 16)"
    parser.add_argument("--weight-bits", type=int, choices=(4, 8, 16, 32), help=text)
    parser.add_argument("--kv-bits", type=int, choices=(8, 16, 32), help="of K and V (default 16)")


def model_of(args: argparse.Namespace, default: str) -> ModelSpec:
    """The model of these options. Raises ValueError."""
    by_hand = ByHand(args.kv_bytes_per_token, args.weights, args.active_weights, args.layers)
    if args.model is None and by_hand:
        model = by_hand.model()
    else:
        model = by_hand.change(model_named(args.model or default))
    return replace(model, weight_bits=args.weight_bits or model.weight_bits, kv_bits=args.kv_bits or model.kv_bits)


def gpu_options(parser: options.Options, default: str) -> None:
    text = f"a name (see {program()} assess --list), or auto: that of this machine (default {default})"
    parser.add_argument("--gpu", metavar="NAME", help=text)
    options.integer(parser, "--num-gpus", 1, "GPUs that share each layer", least=None)
    text = "of one GPU, in any currency: adds the price of 10^6 output tokens"
    options.positive(parser, "--price-per-hour", None, text, metavar="P")


def gpu_of(args: argparse.Namespace, model: ModelSpec, default: str) -> GPU:
    """The GPUs of these options. Raises ValueError."""
    if args.num_gpus < 1 or model.num_heads % args.num_gpus:
        raise ValueError(f"--num-gpus is {args.num_gpus}; a divisor of the {model.num_heads} heads is needed")
    gpu = replace(gpu_named(args.gpu or default), price_per_hour=args.price_per_hour)
    return several(gpu, args.num_gpus)


def html_output(parser: options.Options) -> None:
    options.output(parser, "--html", "write a report on one page here, which needs no other file")


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
