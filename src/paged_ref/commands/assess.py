"""`paged-ref assess`: does paging help a model on a GPU, how much, and with which settings?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..core import device
from ..planner.assess import Assessment, assess
from ..planner.hardware import DEFAULT_GPU, gpu_named, several
from ..planner.models import DEFAULT_MODEL, ModelSpec, model_named
from ..planner.settings import servers
from ..planner.trace_files import trace_named
from ..planner.traces import TraceRequest
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import write_json
from .assess_report import print_known, print_report

DEFAULT_CONTEXT = 2048
DRAWN = 10_000  # requests of sharegpt or alpaca


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
    trace = "lengths of real requests in place of --context: a trace file, sharegpt or alpaca"
    lengths.add_argument("--trace", metavar="FILE", help=trace)
    options.json_output(parser, "also write all numbers here; -: print only them", stdout=True)
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
    requests, source = _requests(args, model)
    found = assess(gpu, model, requests, max_model_len=args.max_model_len)
    if str(args.json) == "-":
        print(json.dumps(as_json(found, source), indent=1))
        return 0
    if args.json:
        write_json(args.json, as_json(found, source))
    print_report(console, found, source)
    return 0


def _requests(args: argparse.Namespace, model: ModelSpec) -> tuple[Sequence[TraceRequest], str]:
    """The requests, and a phrase that says where they come from. Raises ValueError with the option."""
    if args.trace is not None:
        for name in ("context", "prompt"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is {getattr(args, name)}; --trace {args.trace} says the lengths")
        trace = trace_named(args.trace, 0, DRAWN)
        return trace.requests, "; ".join([trace.describe(), *trace.notes])
    most = model.max_context if args.max_model_len is None else min(args.max_model_len, model.max_context)
    context = min(DEFAULT_CONTEXT, most) if args.context is None else args.context
    if not 2 <= context <= most:
        limit = f"{model.name}'s context" if most == model.max_context else "--max-model-len"
        raise ValueError(f"--context is {context}; 2 to {limit} of {most} is allowed")
    prompt = context // 2 if args.prompt is None else args.prompt
    if not 1 <= prompt < context:
        raise ValueError(f"--prompt is {prompt}; 1 to {context - 1} tokens of a context of {context} is allowed")
    source = f"sequences of {context:,} tokens at their end, {prompt:,} of them prompt"
    return [TraceRequest(0.0, prompt, context - prompt)], source


def as_json(found: Assessment, source: str) -> dict[str, Any]:
    """Every number of the assessment, and what follows from the numbers. Infinite gains are null."""
    numbers = asdict(found)
    for plan, given in zip(found.plans, numbers["plans"], strict=True):
        given["step"] = plan.step._asdict() | {"seconds": plan.step.seconds, "bound": plan.step.bound}
        given["tokens_per_second"] = plan.tokens_per_second
    numbers["requests"] = source
    numbers["model"] |= {"weight_bytes": found.model.weight_bytes, "kv_bytes_per_token": found.model.kv_bytes_per_token}
    numbers["gain"] = {name: gain if gain < float("inf") else None for name, gain in found.gain.items()}
    numbers["settings"] = {
        server.name: {"version": server.version, "command": server.command, "options": dict(server.options)}
        for server in servers(found)
    }
    return numbers
