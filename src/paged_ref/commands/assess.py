"""`paged-ref assess`: does paging help a model on a GPU, how much, and with which settings?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from typing import Any

from ..core import device
from ..planner.assess import Assessment, assess
from ..planner.hardware import DEFAULT_GPU, gpu_named, several
from ..planner.models import DEFAULT_MODEL, ModelSpec, model_named
from ..planner.settings import servers
from ..planner.setup import Setup
from ..planner.trace_files import FORMS
from ..planner.traces import DRAWN, RequestTrace, TraceRequest
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import write_json
from .assess_report import print_known, print_report
from .planner_options import bad_row_option, limit_options, limits_of, trace_of_options
from .report_text import write_csv

DEFAULT_CONTEXT = 1500  # with a power of two, `pow2` would reserve as much as `exact`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = f"Hugging Face directory or a name (see --list; default {DEFAULT_MODEL})"
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR", help=name)
    gpu = f"a name (see --list), or auto: that of this machine (default: auto, without a GPU {DEFAULT_GPU})"
    parser.add_argument("--gpu", metavar="NAME", help=gpu)
    options.integer(parser, "--num-gpus", 1, "GPUs that share each layer", least=None)
    parser.add_argument("--weight-bits", type=int, choices=(4, 8, 16, 32), help="of the weights (default 16)")
    parser.add_argument("--kv-bits", type=int, choices=(8, 16, 32), help="of K and V (default 16)")
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
    options.integer(parser, "--max-batch-tokens", 2048, "in a step", least=None)
    options.integer(parser, "--max-batch-seqs", 256, "running at the same time", least=None)
    limit_options(parser)
    options.json_output(parser, "also write all numbers here; -: print only them", stdout=True)
    options.output(parser, "--csv", "also write a line for each way to manage the memory here")
    parser.add_argument("--list", action="store_true", help="the known models and GPUs, and nothing else")


def main(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if args.list:
        print_known(console)
        return 0
    model = model_named(args.model)
    model = replace(model, weight_bits=args.weight_bits or model.weight_bits, kv_bits=args.kv_bits or model.kv_bits)
    if args.num_gpus < 1 or model.num_heads % args.num_gpus:
        raise ValueError(f"--num-gpus is {args.num_gpus}; a divisor of the {model.num_heads} heads is needed")
    gpu = several(gpu_named(args.gpu or ("auto" if device.on_gpu else DEFAULT_GPU)), args.num_gpus)
    trace, source = _requests(args, model)
    limits = limits_of(args)
    base = Setup(
        "paged", gpu, model, max_model_len=args.max_model_len,
        max_batch_tokens=args.max_batch_tokens, max_batch_seqs=args.max_batch_seqs,
    )  # fmt: skip
    found = assess(base, trace, limits)
    if args.csv:
        write_csv(args.csv, [plan.to_json() for plan in found.plans])
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
        trace = trace_of_options(args)
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
    return RequestTrace(source, (TraceRequest(0.0, prompt, context - prompt),), timed=False), source


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
            server.name: {"version": server.version, "command": server.command, "options": dict(server.options)}
            for server in servers(found)
        },
    }
