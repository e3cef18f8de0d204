"""`paged-ref assess`: does paging help a model on a GPU, how much, and with which settings?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from typing import Any

from ..core import device
from ..planner.assess import Assessment, assess
from ..planner.hardware import DEFAULT_GPU
from ..planner.model_config import ModelSpec
from ..planner.models import DEFAULT_MODEL, with_windows
from ..planner.settings import servers
from ..planner.setup import Setup
from ..planner.trace_files import FORMS
from ..planner.traces import DRAWN, RequestTrace, TraceRequest, with_prefixes
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import write_json, write_text
from .assess_report import html, picture, print_known, print_report
from .planner_options import (
    bad_row_option,
    gpu_of,
    gpu_options,
    html_output,
    limit_options,
    limits_of,
    model_of,
    model_options,
    trace_of_options,
)
from .report_text import wide_console, write_csv

SHARING = 50  # requests of a group with the same beginning
DEFAULT_CONTEXT = 1500  # with a power of two, `pow2` would reserve as much as `exact`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_options(parser, DEFAULT_MODEL)
    gpu_options(parser, f"auto, without a GPU {DEFAULT_GPU}")
    lengths = parser.add_argument_group("lengths, in tokens")
    context = f"of a sequence at its end (default {DEFAULT_CONTEXT}, or the model's)"
    options.integer(lengths, "--context", None, context, least=None)
    options.integer(lengths, "--prompt", None, "tokens of the prompt among these (default: half)", least=None)
    options.integer(lengths, "--max-model-len", None, "longest that is accepted (default: the model's)", least=None)
    trace = f"lengths of real requests in place of --context: {FORMS}; or sharegpt, alpaca"
    lengths.add_argument("--trace", metavar="FILE", help=trace)
    number = f"of the trace so many, spread over a longer one (default {DRAWN}; 0: all)"
    options.integer(lengths, "--requests", DRAWN, number, least=0)
    bad_row_option(lengths)
    shared = "tokens with which the prompts of a group begin alike"
    options.integer(lengths, "--prefix-tokens", None, shared)
    options.integer(lengths, "--prefix-groups", None, "such groups, to which the requests belong in turn (default 1)")
    options.integer(parser, "--max-batch-tokens", 2048, "in a step", least=None)
    options.integer(parser, "--max-batch-seqs", 256, "running at the same time", least=None)
    limit_options(parser)
    options.json_output(parser, "also write all numbers here; -: print only them", stdout=True)
    options.output(parser, "--csv", "also write a line for each way to manage the memory here")
    options.svg_output(parser)
    html_output(parser)
    parser.add_argument("--list", action="store_true", help="the known models and GPUs, and nothing else")


def main(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if args.list:
        print_known(wide_console())
        return 0
    model = model_of(args, DEFAULT_MODEL)
    gpu = gpu_of(args, model, "auto" if device.on_gpu else DEFAULT_GPU)
    trace, source = _requests(args, model)
    model = with_windows(model, trace.requests)
    limits = limits_of(args)
    base = Setup(
        "paged", gpu, model, max_model_len=args.max_model_len,
        max_batch_tokens=args.max_batch_tokens, max_batch_seqs=args.max_batch_seqs,
    )  # fmt: skip
    found = assess(base, trace, limits)
    if args.csv:
        write_csv(args.csv, [plan.to_json() for plan in found.plans])
    if args.svg:
        write_text(args.svg, picture(found))
    if args.html:
        write_text(args.html, html(found, trace, source, limits))
    if str(args.json) == "-":
        print(json.dumps(as_json(found, source), indent=1))
        return 0
    if args.json:
        write_json(args.json, as_json(found, source))
    print_report(console, found, source, limits)
    return 0


def _requests(args: argparse.Namespace, model: ModelSpec) -> tuple[RequestTrace, str]:
    """The requests, and a phrase that says where they come from. Raises ValueError with the option."""
    if args.trace is not None:
        for name in ("context", "prompt"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is {getattr(args, name)}; --trace {args.trace} says the lengths")
        trace = _with_prefixes(args, trace_of_options(args))
        return trace, "; ".join([trace.describe(), *trace.notes])
    most = model.max_context if args.max_model_len is None else min(args.max_model_len, model.max_context)
    context = min(DEFAULT_CONTEXT, most) if args.context is None else args.context
    if not 2 <= context <= most:
        limit = f"{model.name}'s context" if most == model.max_context else "--max-model-len"
        raise ValueError(f"--context is {context}; 2 to {limit} of {most} is allowed")
    prompt = context // 2 if args.prompt is None else args.prompt
    if not 1 <= prompt < context:
        raise ValueError(f"--prompt is {prompt}; 1 to {context - 1} tokens of a context of {context} is allowed")
    source = f"sequences of {context:,} tokens at their end, {prompt:,} of them prompt"
    trace = RequestTrace(source, (TraceRequest(0.0, prompt, context - prompt),), timed=False)
    if args.prefix_tokens is None:
        return _with_prefixes(args, trace), source
    number = SHARING * (args.prefix_groups or 1)  # what two passes of a trace begin with is never the same
    trace = _with_prefixes(args, replace(trace, requests=trace.requests * number))
    return trace, "; ".join([source, *trace.notes])


def _with_prefixes(args: argparse.Namespace, trace: RequestTrace) -> RequestTrace:
    if args.prefix_tokens is None:
        if args.prefix_groups is not None:
            raise ValueError(f"--prefix-groups is {args.prefix_groups}; --prefix-tokens says how much is shared")
        return trace
    longest = max(each.prompt_len for each in trace.requests)
    if args.prefix_tokens > longest:
        raise ValueError(f"--prefix-tokens is {args.prefix_tokens}; the longest prompt has {longest} tokens")
    return with_prefixes(trace, args.prefix_tokens, args.prefix_groups or 1)


def as_json(found: Assessment, source: str) -> dict[str, Any]:
    """Every number of the assessment, and what follows from the numbers. Infinite gains are null."""
    model, setup = found.model, found.setup
    numbers = {
        field.name: getattr(found, field.name) for field in fields(found) if field.name not in ("setup", "plans")
    }
    return {
        "gpu": asdict(found.gpu),
        "model": asdict(model) | {"weight_bytes": model.weight_bytes, "kv_bytes_per_token": model.kv_bytes_per_token},
        "constants": asdict(found.constants),
        "requests": source,
        "max_batch_seqs": setup.max_batch_seqs,
        "max_batch_tokens": setup.max_batch_tokens,
        "block_size": setup.block_size,
        **numbers,
        "batches": [asdict(each) for each in found.batches],
        "block_sizes": [asdict(each) for each in found.block_sizes],
        "plans": [plan.to_json() for plan in found.plans],
        "gain": {name: gain if gain < float("inf") else None for name, gain in found.gain.items()},
        "settings": {
            server.name: {
                "version": server.version,
                "looked_up": server.looked_up,
                "command": server.command,
                "options": dict(server.options + server.file_options),
            }
            for server in servers(found)
        },
    }
