"""`paged-ref bench kernels` on a GPU: what paging costs, and how far decoding is from the speed of memory.

Decoding reads every K and V once and does little else, so times are compared with a device-to-device copy, measured
in the same run (bytes read and written over the time). Each contender's answer is checked before it is timed, and
each call reads another set of K, V and tables than the call before, so that no call finds its inputs in the L2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..core.device import xp
from ..kernels import backends
from ..views.common.console import Console
from ..views.common.program import program
from .batch import Batch, Call
from .gpu_clock import GpuClock, Library, Timing
from .peers import FLEX, SDPA, TRITON, peers
from .results import table_of, write_results
from .shapes import Shape, gpu_shapes

Record = dict[str, Any]  # of one shape, ready for JSON
TUNED, TEACHING = "cuda-flash", "cuda"
SLOW = 64 * 4096 * 8  # KV heads times keys beyond which the teaching kernels are left out: they take too long
MAX_SETS = 512
RESERVE = 0.8  # of the free memory that K and V may take

PEERS = {SDPA: "SDPA", FLEX: "Flex", TRITON: "Triton"}
EXPLANATION = """µs: one call on the device, median, by CUDA events (*: launches included)
copy: bytes of K and V over that time, in units of the copy's bandwidth
twin: time over that of the contiguous twin; what it is above 1 is the price of paging
SDPA, Flex, Triton: how many times as fast as torch's scaled_dot_product_attention on contiguous K and V,
as FlexAttention over its own pages, as a plain Triton kernel over ours
host: µs that the host takes to launch one call, without a graph"""


def bench(shape: Shape, timer: GpuClock, tuned: str, teaching: str | None) -> tuple[Record, list[str]]:
    """Measure one shape. Also returns a sentence for each contender that failed."""
    batch = Batch(shape, xp, min(MAX_SETS, max(1, -(-4 * timer.l2_bytes // shape.bytes_held))))
    batch.out = xp.empty_like(batch.query)
    batch.check(tuned)
    ways: dict[str, tuple[list[Call], Library]] = {
        "paged": (batch.paged(tuned), "cupy"),
        "contiguous": (batch.contiguous(tuned), "cupy"),
    }
    if teaching and shape.heads[1] * shape.batch * shape.keys <= SLOW:
        batch.check(teaching)
        ways["teaching"] = (batch.paged(teaching), "cupy")
    others, failures = peers(shape, batch.query, batch.keys, batch.values, batch.tables)
    ways |= {name: (calls, "torch") for name, calls in others.items()}
    timings: dict[str, Timing] = {}
    for name, (calls, library) in ways.items():
        try:
            timings[name] = timer.time(calls, library)
        except Exception as error:
            if library == "cupy":
                raise
            failures.append(f"{name} fails on {shape}: {type(error).__name__}: {str(error).splitlines()[0]}")
    copy = timer.copy_bandwidth()
    seconds = {name: timing.seconds for name, timing in timings.items()}
    best = {peer: min((s for name, s in seconds.items() if name.startswith(peer)), default=None) for peer in PEERS}
    paged = seconds["paged"]
    return {
        "shape": asdict(shape) | {"bytes_read": shape.bytes_read, "sets": batch.count},
        "copy_bytes_per_second": copy,
        "share_of_copy": shape.bytes_read / paged / copy,
        "times_contiguous": paged / seconds["contiguous"],
        "speed_over": {peer: s / paged for peer, s in best.items() if s is not None},
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }, failures


def run(
    wanted: Iterable[Shape], timer: GpuClock, tuned: str, teaching: str | None, minutes: float,
    save: Callable[[list[Record], list[str]], None] = lambda records, notes: None,
) -> tuple[list[Record], list[str], int]:  # fmt: skip
    """Measure shapes in their order until the time is spent. Returns the records, notes for the reader, and how many
    shapes failed: an error ends the measurement of its shape only. `save` is called after each shape."""
    began, too_large, left_out, failed = time.perf_counter(), [], 0, 0
    records: list[Record] = []
    notes: list[str] = []
    for shape in wanted:
        if time.perf_counter() - began > 60 * minutes:
            left_out += 1
            continue
        if shape.bytes_held > RESERVE * timer.free_bytes():
            too_large.append(shape)
            continue
        try:
            record, failures = bench(shape, timer, tuned, teaching)
        except Exception as error:
            failed += 1
            failures = [f"{shape} failed: {type(error).__name__}: {error}"]
        else:
            records.append(record)
        notes += failures
        save(records, notes)
    if too_large:
        notes.append(f"{len(too_large)} shapes need more memory than is free, such as {too_large[0]}")
    if left_out:
        notes.append(f"{left_out} shapes were left out: the {minutes:g} minutes were spent (--minutes)")
    return records, notes, failed


def report_of(records: list[Record], model: str) -> Table:
    """The shapes of one model, a row each."""
    headings = ("batch", "keys", "block", "type", "µs", "copy", "twin", *PEERS.values(), "host")
    rows = (_row(record) for record in records if record["shape"]["model"] == model)
    return table_of(headings, rows, title=model, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)


def _row(record: Record) -> tuple[str, ...]:
    shape, timing = record["shape"], record["timings"]["paged"]
    speed = [f"{record['speed_over'][peer]:.2f}" if peer in record["speed_over"] else "" for peer in PEERS]
    return (
        str(shape["batch"]), f"{'≤ ' if shape['ragged'] else ''}{shape['keys']}", str(shape["block_size"]),
        {"float16": "f16", "bfloat16": "bf16"}[shape["dtype"]],
        f"{1e6 * timing['seconds']:.1f}" + ("" if timing["graph"] else "*"),
        f"{record['share_of_copy']:.0%}", f"{record['times_contiguous']:.3f}", *speed,
        f"{1e6 * timing['launch_seconds']:.0f}",
    )  # fmt: skip


def report(console: Console, records: list[Record], notes: list[str], tuned: str) -> None:
    """Print the tables, their columns explained, and the notes."""
    for model in dict.fromkeys(record["shape"]["model"] for record in records):
        console.print(report_of(records, model))
    if records:
        copies = sorted(record["copy_bytes_per_second"] for record in records)
        console.print(f"Backend {tuned}; copy bandwidth {copies[len(copies) // 2] / 1e9:.0f} GB/s, median of the run.")
        console.print(EXPLANATION)
    for note in notes:
        console.print(f"- {note}", markup=False)


def main(args: argparse.Namespace) -> int:
    tuned = next((name for name in (TUNED, TEACHING) if name in backends()), None)
    if tuned is None:
        raise ValueError(f"no CUDA backend works on this machine; {program()} info says why")
    wanted = [shape for shape in gpu_shapes() if not args.shape or any(words in str(shape) for words in args.shape)]
    if not wanted:
        raise ValueError(f"--shape is {' '.join(args.shape)}; no shape has these words, such as: {next(gpu_shapes())}")
    teaching = TEACHING if tuned != TEACHING and TEACHING in backends() else None

    def save(records: list[Record], notes: list[str]) -> None:
        write_results(args.json, backend=tuned, records=records, notes=notes)

    records, notes, failed = run(wanted, GpuClock(), tuned, teaching, args.minutes, save)
    report(Console(), records, notes, tuned)
    save(records, notes)
    return 1 if failed else 0
