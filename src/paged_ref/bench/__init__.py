"""`paged-ref bench`: timings as ratios within one run, interleaved, medians. Never a test."""

from __future__ import annotations

import argparse
import importlib
import os

from ..views.common.options import subcommands

# Threads that wait for work sleep: OpenMP's would otherwise spin after a call and slow what is timed next. torch and
# BLAS read these when they are loaded, which is after this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

BENCHMARKS = {
    "kernels": ("paged_ref.bench.kernels", "paged against contiguous attention, a streaming read, and torch"),
    "sass": ("paged_ref.bench.sass", "what the tuned GPU kernels cost, counted from machine code; needs no GPU"),
    "host": ("paged_ref.bench.host", "what the host does for a layer on a GPU: launches, their time; needs no GPU"),
    "engine": ("paged_ref.bench.engine", "tokens per second of the engine, and of transformers"),
    "model": ("paged_ref.bench.model", "on a GPU: decoding a whole model against the speed of memory; a CPU's tokens"),
    "simulate": ("paged_ref.bench.simulate", "how fast a trace goes through the schedulers and managers"),
    "memory": ("paged_ref.bench.memory", "the bookkeeping of scheduler and managers: steps, pools, prefixes"),
    "training": ("paged_ref.bench.training", "activations kept, swapped, paged, recomputed; a step's time; torch"),
    "long": ("paged_ref.bench.long", "contexts longer than the device: memory, streaming, budgets"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands(parser, "benchmark", BENCHMARKS, "BENCHMARK")


def main(args: argparse.Namespace) -> int:
    return int(importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args))
