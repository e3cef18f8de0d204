"""`paged-ref bench host`: what the host does for a layer of a decode step on a GPU. Needs no GPU.

The layer's kernels are prepared by the real code, on NumPy arrays, and the launch itself is a call that does nothing.
So the time is the host's alone, and its unit is as many such calls with as many arguments. The four products of a
layer are the library's, and are left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from ..core.attention.attention import Addresses
from ..tuned import fused, launching
from ..tuned.kv import TunedKV
from ..views.common import options
from ..views.common.console import Console
from .results import median_ratio, table_of, write_results

SHAPES = {"Llama-3-8B": (32, 8, 128, 4096, 14336), "embedded": (4, 2, 32, 128, 352)}  # heads to intermediate size
BATCHES = (1, 64)
KEYS, BLOCK_SIZE = 4096, 16
CALLS = 20  # timed together


@dataclass(frozen=True)
class HostCost:
    """What one layer of a decode step costs the host."""

    shape: str
    batch: int
    launches: int  # beside the products
    arguments: int  # of all launches
    microseconds: float
    times_bare: float  # the time over that of as many calls that do nothing


class Layer:
    """The kernels of one layer, as `FusedDecoder` asks for them."""

    def __init__(self, shape: str, batch: int) -> None:
        num_heads, num_kv_heads, head_size, hidden_size, intermediate_size = SHAPES[shape]
        blocks = KEYS // BLOCK_SIZE  # the sequences share theirs: only the shapes count
        self.kv = TunedKV(1, blocks, BLOCK_SIZE, num_kv_heads, head_size, "float16", backend="cuda-flash")
        self.num_qk = num_heads + num_kv_heads
        self.x, self.change = np.zeros((2, batch, hidden_size), np.float16)
        self.weight = np.ones(hidden_size, np.float16)
        self.qkv = np.zeros((batch, self.num_qk + num_kv_heads, head_size), np.float16)
        self.cos = np.zeros((batch, 1, head_size), np.float16)
        self.gate_up = np.zeros((batch, 2 * intermediate_size), np.float16)
        lens = np.full(batch, KEYS, np.int32)
        tables = np.tile(np.arange(blocks, dtype=np.int32), (batch, 1))
        loc, slots = np.arange(batch + 1, dtype=np.int32), np.arange(batch, dtype=np.int32)
        self.addresses = Addresses(lens, loc, block_tables=tables, slot_mapping=slots)

    def launch(self) -> None:
        qk, value = self.qkv[:, : self.num_qk], self.qkv[:, self.num_qk :]
        self.kv.turn_and_attend(0, qk, value, self.cos, self.cos, self.addresses, None)
        fused.add_norm(self.x, self.change, self.weight, 1e-5)
        fused.gated(self.gate_up)
        fused.add_norm(self.x, self.change, self.weight, 1e-5)


def cost(shape: str, batch: int, rounds: int) -> HostCost:
    """Count and time one layer."""
    launched: list[tuple[Any, ...]] = []

    def note(grid: Any, block: Any, args: tuple[Any, ...]) -> None:
        launched.append(args)

    def nothing(grid: Any, block: Any, args: tuple[Any, ...]) -> None:
        pass

    def launch_bare() -> None:
        for args in launched:
            nothing((1, 1, 1), (1, 1, 1), args)

    layer = Layer(shape, batch)
    with launching.on_host(lambda kernel: note):
        layer.launch()
    with launching.on_host(lambda kernel: nothing):
        times, bare = [], []
        for _ in range(rounds):
            times.append(_timed(layer.launch))
            bare.append(_timed(launch_bare))
    arguments = sum(map(len, launched))
    return HostCost(shape, batch, len(launched), arguments, 1e6 * median(times), median_ratio(times, bare))


def _timed(call: Callable[[], object]) -> float:
    """Seconds of a core for one call."""
    call()
    began = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - began) / CALLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--rounds", 21, "rounds for the medians")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    try:
        costs = [cost(shape, batch, args.rounds) for shape in SHAPES for batch in BATCHES]
    except ImportError as error:
        raise ValueError(f"the package {error.name} is not installed: the extra `ptx` brings it") from None
    headings = ("shape", "batch", "launches", "arguments", "host µs", "× bare")
    rows = (
        (
            each.shape, str(each.batch), str(each.launches), str(each.arguments), f"{each.microseconds:.0f}",
            f"{each.times_bare:.0f}",
        )
        for each in costs
    )  # fmt: skip
    console = Console()
    console.print(table_of(headings, rows, title="One layer of a decode step on a GPU: the host's part"))
    console.print("launches: beside four products. × bare: over as many calls that do nothing")
    write_results(args.json, costs=[asdict(each) for each in costs])
    return 0
