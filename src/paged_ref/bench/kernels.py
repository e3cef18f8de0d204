"""`paged-ref bench kernels`: what paging costs, and how far attention is from the speed of memory.

This file measures a CPU; gpu_kernels.py measures a GPU.
All contenders of a shape run in turn, round after round, and the medians are compared: a busy neighbour or a
warming core then slows all of them alike. Each is checked against the reference before it is timed.
Decoding reads every K and V once and does little else, so the bound is a streaming read of the same bytes
with the same threads. torch gets contiguous K and V in the order that is fastest for torch, and its fastest function.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..core.device import Array, on_gpu
from ..core.model.config import kv_bytes_per_token
from ..kernels import naive_attention, paged_attention
from ..views.common import options
from ..views.common.files import write_json
from .gpu_shapes import one_layer
from .results import table_of

Contender = Callable[[], Any]
STREAM, PAGED, CONTIGUOUS, REFERENCE, TORCH = "streaming read", "paged", "contiguous", "reference", "torch SDPA"

# Seconds that each contender runs before its time is taken: cores and caches are then its own, and OpenMP threads of
# the contender before it have stopped. (After a pause instead, the cores would first have to wake up.)
WARM_UP = 0.005


@dataclass(frozen=True)
class Shape:
    """One batch of sequences of the same length."""

    name: str
    num_seqs: int
    query_len: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int = 16
    dtype: str = "float32"

    @property
    def bytes_read(self) -> int:
        """K and V of all sequences, once."""
        layer = one_layer(self.num_heads, self.num_kv_heads, self.head_size)
        return self.num_seqs * self.seq_len * kv_bytes_per_token(layer, self.dtype)

    @property
    def operations(self) -> int:
        """Multiplications and additions for the visible (query, key) pairs."""
        hidden = self.query_len * (self.query_len - 1) // 2
        pairs = self.num_seqs * (self.query_len * self.seq_len - hidden)
        return 4 * pairs * self.num_heads * self.head_size

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_seqs} x {self.query_len} queries on {self.seq_len} keys, "
            f"{self.num_heads} heads on {self.num_kv_heads}, size {self.head_size}, "
            f"blocks of {self.block_size}, {self.dtype}"
        )


SHAPES = (
    Shape("decode", 8, 1, 2048, 32, 8, 128),
    Shape("decode, float16", 8, 1, 2048, 32, 8, 128, dtype="float16"),
    Shape("decode, one long", 1, 1, 16384, 32, 8, 128),
    Shape("decode, small model", 16, 1, 256, 8, 4, 16),
    Shape("prefill chunk", 2, 256, 1024, 32, 8, 128),
)


@dataclass
class Batch:
    """The same keys and values in blocks and in contiguous regions."""

    query: Array
    key_cache: Array
    value_cache: Array
    block_tables: Array
    keys: Array
    values: Array
    starts: Array
    seq_lens: Array
    query_start_loc: Array

    @classmethod
    def of(cls, shape: Shape) -> Batch:
        rng = np.random.default_rng(0)
        blocks = -(-shape.seq_len // shape.block_size)
        rows = (shape.num_seqs * blocks, shape.block_size, shape.num_kv_heads, shape.head_size)
        # Blocks are shuffled, as after many allocations and frees.
        tables = rng.permutation(rows[0]).reshape(shape.num_seqs, blocks).astype(np.int32)
        key_cache, value_cache = (rng.standard_normal(rows, np.float32).astype(shape.dtype) for _ in range(2))
        keys, values = (cache[tables.ravel()].reshape(-1, *rows[2:]) for cache in (key_cache, value_cache))
        count = np.arange(shape.num_seqs + 1, dtype=np.int32)
        queries = (shape.num_seqs * shape.query_len, shape.num_heads, shape.head_size)
        return cls(
            query=rng.standard_normal(queries, np.float32).astype(shape.dtype),
            key_cache=key_cache, value_cache=value_cache, block_tables=tables,
            keys=keys, values=values, starts=count[:-1] * (blocks * shape.block_size),
            seq_lens=np.full(shape.num_seqs, shape.seq_len, np.int32),
            query_start_loc=count * shape.query_len,
        )  # fmt: skip

    def paged(self, backend: str) -> Array:
        return paged_attention(
            self.query, self.key_cache, self.value_cache, self.block_tables, self.seq_lens, self.query_start_loc,
            backend=backend,
        )  # fmt: skip

    def contiguous(self, backend: str) -> Array:
        return naive_attention(
            self.query, self.keys, self.values, self.starts, self.seq_lens, self.query_start_loc, backend=backend
        )


def streaming_read(batch: Batch, threads: int) -> Contender:
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
    caches = [cache.reshape(-1).view(np.float32) for cache in (batch.key_cache, batch.value_cache)]

    def read() -> None:
        for numbers in caches:
            cpu.in_threads(add_up, threads, numbers, sums)

    return read


def torch_attention(shape: Shape, batch: Batch, threads: int) -> dict[str, Contender]:
    """The ways to compute the batch with torch, of which the fastest counts. Empty where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    num_seqs, group = shape.num_seqs, shape.num_heads // shape.num_kv_heads

    def heads_first(array: Array, length: int, heads: int) -> Any:
        """[num_seqs, heads, length, head_size], contiguous."""
        rows = array.reshape(num_seqs, -1, heads, shape.head_size)[:, :length]
        return torch.from_numpy(np.ascontiguousarray(rows.transpose(0, 2, 1, 3)))

    query = heads_first(batch.query, shape.query_len, shape.num_heads)
    key = heads_first(batch.keys, shape.seq_len, shape.num_kv_heads)
    value = heads_first(batch.values, shape.seq_len, shape.num_kv_heads)
    mask = None
    if shape.query_len > 1:  # is_causal aligns at the start; a chunk at the end needs the mask in full
        mask = torch.ones(shape.query_len, shape.seq_len, dtype=torch.bool).tril(shape.seq_len - shape.query_len)

    def shared() -> Any:
        with torch.inference_mode():
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2).reshape(batch.query.shape).numpy()

    def grouped() -> Any:  # the heads of a group as queries of one head: no K is read twice
        with torch.inference_mode():
            rows = query.reshape(num_seqs, shape.num_kv_heads, group, shape.head_size)
            return scaled_dot_product_attention(rows, key, value).reshape(batch.query.shape).numpy()

    return {"enable_gqa": shared} | ({"grouped": grouped} if shape.query_len == 1 else {})


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
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
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def bench(shape: Shape, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Measure one shape. One record for each contender, ready for JSON."""
    batch = Batch.of(shape)
    contenders: dict[str, Contender] = {
        STREAM: streaming_read(batch, threads),
        PAGED: lambda: batch.paged("cpu-simd"),
        CONTIGUOUS: lambda: batch.contiguous("cpu-simd"),
        REFERENCE: lambda: batch.paged("reference"),
    }
    torch_ways = torch_attention(shape, batch, threads)
    contenders |= {f"{TORCH} {way}": run for way, run in torch_ways.items()}
    expected, bound = contenders[REFERENCE](), 1e-4 if shape.dtype == "float32" else 5e-3
    for name, run in contenders.items():  # also compiles what is not compiled yet
        answer = run()
        if answer is not None and not np.abs(answer.astype(np.float32) - expected).max() < bound:
            raise RuntimeError(f"{name} is off by {np.abs(answer - expected).max()} on {shape}; {bound} is allowed")

    seconds = measure(contenders, rounds)
    ways = {name: seconds.pop(name) for name in list(seconds) if name.startswith(TORCH)}
    if ways:
        best = min(ways, key=lambda name: ways[name])
        seconds[TORCH] = ways[best]
    return [
        {
            "contender": name,
            "milliseconds": 1e3 * taken,
            "gigabytes_per_second": shape.bytes_read / taken / 1e9,
            "gigaflops": None if name == STREAM else shape.operations / taken / 1e9,
            "share_of_streaming_read": seconds[STREAM] / taken,
            "times_contiguous": taken / seconds[CONTIGUOUS],
            "speed_over_torch": seconds[TORCH] / taken if ways else None,
        }
        for name, taken in seconds.items()
    ]


def report_of(shape: Shape, records: list[dict[str, Any]]) -> Table:
    headings = ("", "ms", "GB/s", "GFLOP/s", "of streaming read", "time / contiguous", "speed / torch")
    table = table_of(headings, map(_row, records), title=str(shape), title_justify="left", box=box.HEAVY_HEAD)
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
    chosen = [shape for shape in SHAPES if not args.shape or any(words in shape.name for words in args.shape)]
    if not chosen:
        known = "; ".join(shape.name for shape in SHAPES)
        raise ValueError(f"--shape is {' '.join(args.shape)!r}; known are: {known}")
    results = []
    for shape in chosen:
        records = bench(shape, args.rounds, cpu.THREADS)
        console.print(report_of(shape, records))
        results.append({"shape": asdict(shape), "records": records})
    if importlib.util.find_spec("torch") is None:
        console.print("torch is not installed: its column is empty (the extra `compare` brings it)")
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": cpu.THREADS}
        write_json(args.json, {"machine": machine, "results": results})
    return 0
