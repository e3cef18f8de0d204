"""`paged-ref bench kernels`: what paging costs, and how far attention is from the speed of memory.

This file measures a CPU; gpu_kernels.py measures a GPU.
All contenders of a shape run in turn, round after round, and the medians are compared: a busy neighbour or a
warming core then slows all of them alike. Each is checked before it is timed.
Decoding reads every K and V once and does little else, so the bound is a streaming read of the same bytes with the same
threads: the faster of two different reads. torch gets contiguous K and V in the order that is fastest for torch, and
its fastest function. Contiguous attention runs twice in each round: how far the two differ is what a difference between
other contenders has to exceed.
"""

from __future__ import annotations

import argparse
import importlib.util
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..core.device import Array, on_gpu
from ..tuned.threads import in_threads, num_threads
from ..views.common import options
from ..views.common.console import Console
from .batch import Batch, Call
from .peers import SDPA, sdpa
from .results import table_of, take_turns, write_results
from .shapes import Shape

STREAM, PAGED, CONTIGUOUS, AGAIN = "streaming read", "paged", "contiguous", "contiguous, again"
REFERENCE = "reference"

ORDER = (STREAM, PAGED, CONTIGUOUS, REFERENCE, SDPA)  # as the table has them

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


def streaming_reads(batch: Batch, threads: int) -> dict[str, Call]:
    """Two ways to read the bytes of K and V once, each thread its own part: all added up, and one of each line of the
    cache. Which one is faster depends on whether the core or memory is the limit."""
    from numba import njit

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

    def read(step: int) -> None:
        for numbers in caches:
            in_threads(add_up, threads, numbers[::step], sums)

    line = 64 // 4  # float32s
    return {f"{STREAM}, all": lambda: read(1), f"{STREAM}, lines": lambda: read(line)}


def measure(contenders: dict[str, Call], rounds: int) -> dict[str, float]:
    """The median seconds of each contender, run in turn. The reference is slow, and runs afterwards, three times."""
    seconds: dict[str, float] = {}
    slow = {name: call for name, call in contenders.items() if name == REFERENCE}
    fast = {name: call for name, call in contenders.items() if name != REFERENCE}
    for group, times in ((fast, rounds), (slow, min(3, rounds))):
        for name, turn in zip(group, take_turns(group.values(), times, WARM_UP), strict=True):
            seconds[name] = median(each.seconds for each in turn)
    return seconds


def fastest(seconds: dict[str, float], name: str) -> None:
    """Of several ways, whose names begin with `name`, keep the fastest under that name."""
    ways = {way: seconds.pop(way) for way in list(seconds) if way.startswith(name)}
    if ways:
        seconds[name] = min(ways.values())


def bench(shape: Shape, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Measure one shape. One record for each contender, ready for JSON."""
    batch = Batch(shape, np)
    batch.check("cpu-simd")  # also compiles what is not compiled yet
    contenders = {
        **streaming_reads(batch, threads),
        PAGED: batch.paged("cpu-simd")[0],
        CONTIGUOUS: batch.contiguous("cpu-simd")[0],
        REFERENCE: batch.paged("reference")[0],
    }
    for call in contenders.values():
        call()  # compiles
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        contenders |= {name: calls[0] for name, calls in sdpa(shape, batch.query, batch.keys, batch.values).items()}
    contenders[AGAIN] = contenders[CONTIGUOUS]

    seconds = measure(contenders, rounds)
    fastest(seconds, STREAM)
    fastest(seconds, SDPA)
    again = seconds.pop(AGAIN)
    return [
        {
            "contender": name,
            "milliseconds": 1e3 * taken,
            "gigabytes_per_second": shape.bytes_read / taken / 1e9,
            "gigaflops": None if name == STREAM else operations(shape) / taken / 1e9,
            "share_of_streaming_read": seconds[STREAM] / taken,
            "times_contiguous": taken / seconds[CONTIGUOUS],
            "speed_over_torch": seconds[SDPA] / taken if SDPA in seconds else None,
            "again_times_first": again / taken if name == CONTIGUOUS else None,
        }
        for name, taken in sorted(seconds.items(), key=lambda item: ORDER.index(item[0]))
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
    console = Console()
    chosen = [name for name in SHAPES if not args.shape or any(words in name for words in args.shape)]
    if not chosen:
        raise ValueError(f"--shape is {' '.join(args.shape)!r}; known are: {'; '.join(SHAPES)}")
    results = []
    for name in chosen:
        facts, records = facts_of(name, SHAPES[name]), bench(SHAPES[name], args.rounds, num_threads())
        console.print(report_of(TITLE.format(**facts), records))
        again = next(record["again_times_first"] for record in records if record["contender"] == CONTIGUOUS)
        console.print(f"contiguous twice in the same rounds: the second takes {again:.2f} times the first")
        results.append({"shape": facts, "records": records})
    if importlib.util.find_spec("torch") is None:
        console.print("torch is not installed: its column is empty (the extra `compare` brings it)")
    write_results(args.json, results=results)
    return 0
