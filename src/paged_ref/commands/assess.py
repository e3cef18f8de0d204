"""`paged-ref assess`: does paging help a model on a GPU, how much, and with which settings?"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from typing import Any

from ..core import device
from ..planner.assess import Assessment, assess
from ..planner.hardware import DEFAULT_GPU
from ..planner.model_config import ModelSpec
from ..planner.models import DEFAULT_MODEL
from ..planner.settings import servers
from ..planner.traces import RequestTrace, TraceRequest, with_prefixes
from ..views.common import options
from . import planner_options as shared
from .assess_report import PAGE_WIDTH, picture, print_known, results, title_of
from .html_report import page
from .report_text import print_parts, print_title

SHARING = 50  # requests of a group with the same beginning
# Of a sequence. The reservations differ for it: the buddy allocator gives `exact` 1,024 slots, and `pow2`, which rounds
# an output of a third up to 512, gets 2,048. With an output of half, or a length above a power of two, both are equal.
DEFAULT_CONTEXT, DEFAULT_OF = 1000, 2048  # tokens, and the model's context from which on
PROMPT_SHARE = 2 / 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.server_options(parser, DEFAULT_MODEL, f"auto, without a GPU {DEFAULT_GPU}")
    lengths = parser.add_argument_group("lengths, in tokens")
    context = f"of a sequence at its end (default {DEFAULT_CONTEXT}, or half of a context below {DEFAULT_OF})"
    options.integer(lengths, "--context", None, context, least=None)
    options.integer(lengths, "--prompt", None, "tokens of the prompt among these (default: two thirds)", least=None)
    shared.trace_options(lengths, None, "lengths of real requests in place of --context: {}; or sharegpt, alpaca")
    text = "tokens with which the prompts of a group begin alike"
    options.integer(lengths, "--prefix-tokens", None, text)
    options.integer(lengths, "--prefix-groups", None, "such groups, to which the requests belong in turn (default 1)")
    shared.limit_options(parser)
    shared.file_options(parser)
    parser.add_argument("--list", action="store_true", help="the known models and GPUs, and nothing else")


def main(args: argparse.Namespace) -> int:
    console = shared.report_console(args, least=0)
    if args.list:
        print_known(shared.report_console(args))
        return 0
    model = shared.model_of(args, DEFAULT_MODEL)
    gpu = shared.gpu_of(args, model, "auto" if device.on_gpu else DEFAULT_GPU)
    trace, source = _requests(args, model)
    limits = shared.limits_of(args)
    found = assess(shared.setup_of(args, gpu, model, trace), trace, limits)
    title = title_of(found)
    print_title(console, title)
    print_parts(console, results(found, trace, source, limits, console.width))
    shared.write_files(
        args,
        lambda: as_json(found, source),
        [plan.to_json() for plan in found.plans],
        lambda: picture(found),
        lambda: page(title, found.setup, results(found, trace, source, limits, PAGE_WIDTH)),
    )
    return 0


def _requests(args: argparse.Namespace, model: ModelSpec) -> tuple[RequestTrace, str]:
    """The requests, and a phrase that says where they come from. Raises ValueError with the option."""
    if args.trace is not None:
        for name in ("context", "prompt"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is {getattr(args, name)}; --trace {args.trace} says the lengths")
        trace = _with_prefixes(args, shared.trace_of_options(args))
        return trace, "; ".join([trace.describe(), *trace.notes])
    most = model.max_context if args.max_model_len is None else min(args.max_model_len, model.max_context)
    usual = max(2, DEFAULT_CONTEXT * min(most, DEFAULT_OF) // DEFAULT_OF)
    context = usual if args.context is None else args.context
    if not 2 <= context <= most:
        limit = f"{model.name}'s context" if most == model.max_context else "--max-model-len"
        raise ValueError(f"--context is {context}; 2 to {limit} of {most} is allowed")
    prompt = max(1, int(context * PROMPT_SHARE)) if args.prompt is None else args.prompt
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
        "constants": asdict(found.setup.constants),
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
