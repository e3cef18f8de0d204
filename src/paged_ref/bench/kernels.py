"""`paged-ref bench kernels`: what paging costs, and how far attention is from the speed of memory.

This file measures a CPU; gpu_kernels.py measures a GPU.
All contenders of a shape run in turn, round after round, and the medians are compared: a busy neighbour or a
warming core then slows all of them alike. Each is checked before it is timed.
Decoding reads every K and V once and does little else, so the bound is a streaming read of the same bytes
with the same threads. torch gets contiguous K and V in the order that is fastest for torch, and its fastest function.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import time
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..core.device import Array, on_gpu
from ..views.common import options
from ..views.common.console import Console
from .batch import Batch, Call
from .peers import SDPA, sdpa
from .results import table_of, write_results
from .shapes import Shape

STREAM, PAGED, CONTIGUOUS, REFERENCE = "streaming read", "paged", "contiguous", "reference"

# Seconds that each contender runs before its time is taken: cores and caches are then its own, and OpenMP threads of
# the contender before it have stopped. (After a pause instead, the cores would first have to wake up.)
WARM_UP = 0.005

SHAPES = {
    "decode": Shape("Llama-3-8B", 8, 2048, dtype="float32"),
    "decode, float16": Shape("Llama-3-8B", 8, 2048),
    "decode, one long": Shape("Llama-3-8B", 1, 16384, dtype="float32"),
    "decode, small model": Shape("embedded", 16, 256, dtype="float32"),
    "prefill chunk": Shape("Llama-3-8B", 2, 1024, dtype="float32", query_len=256),
}
TITLE = (
    "{name}: {num_seqs} x {query_len} queries on {seq_len} keys, {num_heads} heads on {num_kv_heads}, "
    "size {head_size}, blocks of {block_size}, {dtype}"
)


def facts_of(name: str, shape: Shape) -> dict[str, Any]:
    """The shape as the title and the JSON file have it."""
    num_heads, num_kv_heads, head_size = shape.heads
    return {
        "name": name, "num_seqs": shape.batch, "query_len": shape.query_len, "seq_len": shape.keys,
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_size": head_size,
        "block_size": shape.block_size, "dtype": shape.dtype,
    }  # fmt: skip


def operations(shape: Shape) -> int:
    """Multiplications and additions for the visible (query, key) pairs."""
    hidden = shape.query_len * (shape.query_len - 1) // 2
    num_heads, _, head_size = shape.heads
    return 4 * shape.batch * (shape.query_len * shape.keys - hidden) * num_heads * head_size


def streaming_read(batch: Batch, threads: int) -> Call:
    """Adds up the bytes of K and V as float32, each thread its own part: the fastest read that uses every byte."""
    from numba import njit

    from ..tuned import cpu_simd as cpu

    @njit(nogil=True, fastmath={"reassoc", "nsz"})  # type: ignore[untyped-decorator]  # sums in vectors
    def add_up(thread: int, threads: int, numbers: Array, sums: Array) -> None:
        count = len(numbers)
        stretch = numbers[thread * count // threads : (thread + 1) * count // threads]
        total = np.float32(0)
        for i in range(len(stretch)):
            total += stretch[i]
        sums[thread] = total

    sums = np.zeros(threads, np.float32)
    caches = [cache.reshape(-1).view(np.float32) for cache in (batch.keys, batch.values)]

    def read() -> None:
        for numbers in caches:
            cpu.in_threads(add_up, threads, numbers, sums)

    return read


def measure(contenders: dict[str, Call], rounds: int) -> dict[str, float]:
    """The median seconds of each contender, run in turn. The reference is slow, and runs in three rounds only."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name, run in contenders.items():
            if name == REFERENCE and i >= 3:
                continue
            warm = time.perf_counter() + WARM_UP
            while time.perf_counter() < warm:
                run()
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: median(seconds) for name, seconds in times.items()}


def bench(shape: Shape, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Measure one shape. One record for each contender, ready for JSON."""
    batch = Batch(shape, np)
    batch.check("cpu-simd")  # also compiles what is not compiled yet
    contenders = {
        STREAM: streaming_read(batch, threads),
        PAGED: batch.paged("cpu-simd")[0],
        CONTIGUOUS: batch.contiguous("cpu-simd")[0],
        REFERENCE: batch.paged("reference")[0],
    }
    contenders[STREAM]()
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        contenders |= {name: calls[0] for name, calls in sdpa(shape, batch.query, batch.keys, batch.values).items()}

    seconds = measure(contenders, rounds)
    ways = [seconds.pop(name) for name in contenders if name.startswith(SDPA)]
    if ways:
        seconds[SDPA] = min(ways)
    return [
        {
            "contender": name,
            "milliseconds": 1e3 * taken,
            "gigabytes_per_second": shape.bytes_read / taken / 1e9,
            "gigaflops": None if name == STREAM else operations(shape) / taken / 1e9,
            "share_of_streaming_read": seconds[STREAM] / taken,
            "times_contiguous": taken / seconds[CONTIGUOUS],
            "speed_over_torch": seconds[SDPA] / taken if ways else None,
        }
        for name, taken in seconds.items()
    ]


def report_of(title: str, records: list[dict[str, Any]]) -> Table:
    headings = ("", "ms", "GB/s", "GFLOP/s", "of streaming read", "time / contiguous", "speed / torch")
    table = table_of(headings, map(_row, records), title=title, title_justify="left", box=box.HEAVY_HEAD)
    table.columns[0].no_wrap = True
    return table


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    stream = record["contender"] == STREAM
    torch_ratio, gigaflops = record["speed_over_torch"], record["gigaflops"]
    return (
        record["contender"],
        f"{record['milliseconds']:.3f}",
        f"{record['gigabytes_per_second']:.1f}",
        "" if gigaflops is None else f"{gigaflops:.0f}",
        f"{record['share_of_streaming_read']:.0%}",
        "" if stream else f"{record['times_contiguous']:.2f}",
        "" if stream or torch_ratio is None else f"{torch_ratio:.2f}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--rounds", 21, "rounds for the medians")
    parser.add_argument("--shape", action="append", metavar="WORDS", help="only shapes whose name has these words")
    options.json_output(parser, "write the numbers to FILE too")
    options.positive(parser, "--minutes", 10, "on a GPU: start no shape after that")


def main(args: argparse.Namespace) -> int:
    if on_gpu:
        from . import gpu_kernels

        return gpu_kernels.main(args)
    from ..tuned import cpu_simd as cpu  # here, so that the command line starts without the compiler

    console = Console()
    chosen = [name for name in SHAPES if not args.shape or any(words in name for words in args.shape)]
    if not chosen:
        raise ValueError(f"--shape is {' '.join(args.shape)!r}; known are: {'; '.join(SHAPES)}")
    results = []
    for name in chosen:
        facts, records = facts_of(name, SHAPES[name]), bench(SHAPES[name], args.rounds, cpu.THREADS)
        console.print(report_of(TITLE.format(**facts), records))
        results.append({"shape": facts, "records": records})
    if importlib.util.find_spec("torch") is None:
        console.print("torch is not installed: its column is empty (the extra `compare` brings it)")
    machine = {"processor": platform.processor() or platform.machine(), "threads": cpu.THREADS}
    write_results(args.json, machine=machine, results=results)
    return 0
