"""`paged-ref bench long`: what a context costs that does not fit on the device, measured for K and V of one layer.

The keys and values are random: the times and counts do not depend on them. Three questions: does device memory stay
constant while the context grows; what does streaming cost, compared with a run that holds everything; and what does a
budget save. Contenders take turns, and their shortest times are compared.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from rich.table import Table

from ..beyond_device.attention import TwoCaches, streamed_attention
from ..beyond_device.options import STAGING_BYTES, LongOptions
from ..beyond_device.relevance import Attend
from ..core.device import Array, on_gpu, xp
from ..core.engine.scheduler import StepPlan
from ..core.engine.sequence import Sequence
from ..core.model.config import ModelConfig
from ..extras.memory_limit import require_memory
from ..kernels import paged_attention
from ..tuned.copies import exactly_pinned
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .results import Times, shortest, table_of, write_results

BLOCK_SIZE = 16
CHUNK = 4096  # tokens written in one step
SHAPES = {"Llama 3 8B": (32, 8, 128), "TinyLlama": (32, 4, 64), "embedded": (8, 4, 16)}  # of one layer
SMALL = (8, 2, 64)  # of the table that grows to a million tokens: 1 GiB of K and V there, in float32


@dataclass(frozen=True)
class Growth:
    """One length of the context."""

    tokens: int
    device_bytes: int
    bytes_in: int  # for one more token
    on_paper: int
    seconds: float


@dataclass(frozen=True)
class Ratio:
    """The time of one contender, and of the contender that it is compared with."""

    name: str
    seconds: float
    against: float
    cores: float  # the ratio of the times that all cores together spent

    @classmethod
    def of(cls, name: str, times: Times, against: Times) -> Ratio:
        return cls(name, times.seconds, against.seconds, times.cores / against.cores)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(
        parser, "--contexts", [2**12, 2**14, 2**16, 2**18, 2**20],
        "tokens, from small to large (default 4096 to 1048576)", nargs="+", least=None,
    )  # fmt: skip
    options.integer(parser, "--device-blocks", 128, "while the context grows", least=2, metavar="B")
    options.integer(parser, "--tokens", 2**16, "of the other two tables", least=1024)
    options.integer(parser, "--rounds", 7, "the shortest of so many times")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    if min(args.contexts) < 1 or sorted(args.contexts) != args.contexts:
        raise ValueError(f"--contexts is {args.contexts}; numbers from 1 on are needed, from small to large")
    _, kv_heads, head_size = SHAPES["Llama 3 8B"]
    what = f"--tokens is {args.tokens}: a layer's keys and values of this size"
    require_memory(what, 2 * 4 * kv_heads * head_size * args.tokens)
    console = Console(soft_wrap=True)
    growth = grow(args.contexts, args.device_blocks, args.rounds)
    console.print(_growth_table(growth, args.device_blocks))
    ratios = [*streaming(args.tokens, args.rounds), *budgets(args.tokens, args.rounds)]
    console.print(_ratio_table(ratios, args.tokens))
    write_results(args.json, growth=[asdict(row) for row in growth], ratios=[asdict(row) for row in ratios])
    return 0


# --- one layer and one sequence ------------------------------------------------------------------------------


class Layer:
    """One layer's pages of one sequence of random keys. While it grows, nothing attends to it."""

    def __init__(self, shape: tuple[int, int, int], device_blocks: int, host_blocks: int, attend: Attend) -> None:
        num_heads, num_kv_heads, head_size = shape
        config = ModelConfig(
            vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_size=head_size, max_position_embeddings=1,
        )  # fmt: skip
        choice = LongOptions(device_blocks, host_blocks, attend=attend, full_layers=0)
        self.manager, self.kv = choice.make(config, BLOCK_SIZE, "float32", CHUNK, "auto", False, None)
        self._rng = np.random.default_rng(0)
        self._noise = xp.asarray(self._rng.standard_normal((2, 2 * CHUNK, num_kv_heads, head_size), dtype=np.float32))
        self.query = xp.asarray(self._rng.standard_normal((1, num_heads, head_size), dtype=np.float32))
        self.seq = Sequence(0, [], 0, 0)
        self.manager.admit(0, [], 1)

    def _begin(self, count: int) -> Array:
        """Keys and values of `count` more tokens: [2, count, num_kv_heads, head_size]."""
        self.manager.append([(0, count)])
        self.kv.begin_step(StepPlan([(self.seq, count)]))
        self.seq.num_computed += count
        first = int(self._rng.integers(CHUNK))
        return self._noise[:, first : first + count]

    def grow(self, length: int) -> None:
        while self.seq.num_computed < length:
            self.kv.write(0, *self._begin(min(CHUNK, length - self.seq.num_computed)))

    def step(self) -> None:
        """One more token."""
        key, value = self._begin(1)
        self.kv.attend(0, self.query, key, value, None, None)


def grow(contexts: list[int], device_blocks: int, rounds: int) -> list[Growth]:
    """Time and bytes of one more token, exactly, at each length."""
    layer = Layer(SMALL, device_blocks, -(-(contexts[-1] + len(contexts) * (rounds + 1)) // BLOCK_SIZE) + 1, "all")
    kv = layer.kv
    found = []
    for tokens in contexts:
        layer.grow(tokens)
        layer.step()
        pages = SMALL[1] * -(-(layer.seq.num_computed + 1) // BLOCK_SIZE)
        before = kv.counters.bytes_in
        ((seconds, _),) = shortest([layer.step], rounds)
        moved = (kv.counters.bytes_in - before) // (rounds + 1)  # and the first step, which is not timed
        here = sum(block >= 0 for block in kv.manager.residency.device_of)
        on_paper = max(0, pages - here) * kv.page_bytes
        found.append(Growth(tokens, kv.device_bytes, moved, on_paper, seconds))
    return found


def streaming(tokens: int, rounds: int) -> list[Ratio]:
    """The same attention with everything on the device, and with everything on the host; copies included."""
    found = []
    for name, (heads, kv_heads, size) in SHAPES.items():
        for way in ("tiles", "pieces")[on_gpu:]:
            caches, table = _both(tokens, kv_heads, size, way)
            nowhere, lens = np.full_like(table, -1), np.full(kv_heads, tokens)
            for queries in (1, 64) if way == "tiles" or on_gpu else (1,):
                shape = (kv_heads * queries, heads // kv_heads, size)
                query = xp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
                loc = np.arange(kv_heads + 1) * queries
                on_device = (xp.asarray(table), xp.asarray(lens), xp.asarray(loc))
                resident = partial(paged_attention, query, caches.keys, caches.values, *on_device, validate=False)
                streamed = partial(streamed_attention, query, caches, nowhere, table, lens, loc)
                times = shortest([streamed, resident], rounds)
                found.append(Ratio.of(f"{name}, {queries} new: {way} / resident", *times))
                if on_gpu and queries == 1:  # the bus is the limit: how close is this to a plain copy?
                    times = shortest([streamed, partial(_copy, caches, table.size)], rounds)
                    found.append(Ratio.of(f"{name}, 1 new: {way} / a plain copy", *times))
    return found


def _copy(caches: TwoCaches, num_blocks: int) -> None:
    for device, host in ((caches.keys, caches.host_keys), (caches.values, caches.host_values)):
        device[:num_blocks].set(host[:num_blocks])


def _both(tokens: int, kv_heads: int, head_size: int, way: str) -> tuple[TwoCaches, np.ndarray]:
    """The same blocks on the device and on the host, and the table [kv_heads, blocks] that fits either."""
    per_head = -(-tokens // BLOCK_SIZE)
    total = per_head * kv_heads
    noise = np.random.default_rng(0).standard_normal((1, BLOCK_SIZE, 1, head_size), dtype=np.float32)
    num_staging = min(total // 4, STAGING_BYTES // (2 * noise.nbytes)) if way == "pieces" else 0
    shape = (2 * total + num_staging, *noise.shape[1:])
    keys, values = (np.broadcast_to(noise, shape).copy() for _ in range(2))
    first_host = total + num_staging
    device_keys, device_values = (xp.asarray(array[:first_host]) for array in (keys, values))
    host_keys, host_values = (_pinned(array[first_host:]) for array in (keys, values))
    whole = None if way == "pieces" else (keys, values)
    caches = TwoCaches(device_keys, device_values, host_keys, host_values, range(total, first_host), whole)
    return caches, np.arange(total).reshape(kv_heads, per_head)


def budgets(tokens: int, rounds: int) -> list[Ratio]:
    """A tenth of the pages on the device: the exact mode compared with budgets."""
    num_blocks = -(-(tokens + 4 * rounds) // BLOCK_SIZE)
    attends: tuple[Attend, ...] = ("all", 0.25, 0.1)
    layers = [Layer(SHAPES["Llama 3 8B"], num_blocks // 10, num_blocks + 1, attend) for attend in attends]
    for layer in layers:
        layer.grow(tokens)
        for _ in range(3):
            layer.step()
    everything, *others = shortest([layer.step for layer in layers], rounds)
    return [
        Ratio.of(f"Llama 3 8B, 1 new: attend all / {attend}", everything, against)
        for attend, against in zip(attends[1:], others, strict=True)
    ]


def _pinned(array: np.ndarray) -> np.ndarray:
    if not on_gpu:
        return array
    pinned = exactly_pinned(array.shape, array.dtype)
    pinned[:] = array
    return pinned


# --- tables ------------------------------------------------------------------------------------------------


def _growth_table(growth: list[Growth], device_blocks: int) -> Table:
    heads, kv_heads, head_size = SMALL
    headings = ("context", "device MiB", "MiB from host", "on paper", "ms", "ns/token of context")
    rows = (
        (
            f"{row.tokens:,}", f"{row.device_bytes / 2**20:.2f}", f"{row.bytes_in / 2**20:,.2f}",
            f"{row.on_paper / 2**20:,.2f}", f"{row.seconds * 1e3:,.2f}", f"{row.seconds / row.tokens * 1e9:.1f}",
        )
        for row in growth
    )  # fmt: skip
    title = (
        f"One more token, exactly: one layer, {heads} heads, {kv_heads} KV heads of {head_size}, "
        f"{device_blocks} device blocks\n{describe_device()}"
    )
    return table_of(headings, rows, title=title)


def _ratio_table(ratios: list[Ratio], tokens: int) -> Table:
    rows = (
        (
            row.name,
            f"{row.seconds * 1e3:.3g} / {row.against * 1e3:.3g}",
            f"{row.seconds / row.against:.2f}",
            f"{row.cores:.2f}",
        )
        for row in ratios
    )
    title = (
        f"One layer of the shape of a model, {tokens:,} tokens of context.\n"
        "Streamed, nothing is on the device; with a budget, 10% of the pages can be"
    )
    table = table_of(("", "ms", "ratio", "of cores"), rows, title=title)
    for column in table.columns[1:]:
        column.no_wrap = True
    return table
