"""`paged-ref bench`: timings as ratios within one run, interleaved, medians. Never a test."""

from __future__ import annotations

import argparse
import importlib
import os

from ..tuned.threads import blas_threads
from ..views.common.console import Console
from ..views.common.options import subcommands

# Threads that wait for work sleep: OpenMP's would otherwise spin after a call and slow what is timed next. torch reads
# these when it is loaded, which is after this. NumPy's BLAS is loaded already, and has one thread (see `main`).
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["KMP_BLOCKTIME"] = "0"

# What each measures, and examples beside `bench NAME`.
_ABOUT: dict[str, tuple[str, ...]] = {
    "kernels": (
        "paged against contiguous attention, a streaming read, and torch",
        "bench kernels --minutes 1 --json kernels.json",
    ),
    "sass": ("what the tuned GPU kernels cost, counted from machine code; needs no GPU",),
    "host": ("what the host does for a layer on a GPU: launches, their time; needs no GPU",),
    "engine": ("tokens per second of the engine, and of transformers",),
    "model": ("on a GPU: decoding a whole model against the speed of memory; a CPU's tokens",),
    "formats": ("K and V in fewer bits: the cost in perplexity, and the blocks saved",),
    "simulate": ("how fast a trace goes through the schedulers and managers",),
    "memory": ("the bookkeeping of scheduler and managers: steps, pools, prefixes",),
    "training": ("activations kept, swapped, paged, recomputed; a step's time; torch",),
    "distributed": ("ranks that share a model (MPI) against one process of threads",),
    "long": ("contexts longer than the device: memory, streaming, budgets", "bench long --contexts 4096 16384"),
}
BENCHMARKS = {
    name: (f"paged_ref.bench.{name}", summary, (f"bench {name}", *examples))
    for name, (summary, *examples) in _ABOUT.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands(parser, "benchmark", BENCHMARKS, "BENCHMARK")


def main(args: argparse.Namespace) -> int:
    from . import conditions  # here, so that the command line starts without the compiler

    load = conditions.load()
    with blas_threads():
        status = int(importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args))
    Console(highlight=False).print(conditions.closing_line(load))
    return status
