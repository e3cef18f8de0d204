"""`paged-ref bench`: timings as ratios within one run, interleaved, medians. Never a test."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = {
    "kernels": ("paged_ref.bench.kernels", "paged against contiguous attention, a streaming read, and torch"),
    "sass": ("paged_ref.bench.sass", "what the tuned GPU kernels cost, counted from machine code; needs no GPU"),
    "engine": ("paged_ref.bench.engine", "tokens per second of the engine, and of transformers"),
    "model": (
        "paged_ref.bench.model",
        "on a GPU: whole-model decoding against the speed of memory, and a CPU's tokens",
    ),
    "simulate": ("paged_ref.bench.simulate", "how fast a trace goes through the schedulers and managers"),
    "memory": ("paged_ref.bench.memory", "the bookkeeping of scheduler and managers: steps, pools, prefixes"),
    "training": ("paged_ref.bench.training", "activations kept, swapped, paged, recomputed; a step's time; torch"),
    "long": ("paged_ref.bench.long", "contexts longer than the device: memory, streaming, budgets"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module, summary) in BENCHMARKS.items():
        benchmark = which.add_parser(name, help=summary, description=summary)
        importlib.import_module(module).add_arguments(benchmark)


def main(args: argparse.Namespace) -> int:
    return int(importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args))
