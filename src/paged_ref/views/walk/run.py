"""The run behind the kernel walk: a small attention call, run by both teaching kernels in the tracer.

The two kernels get the same queries, keys and values; the naive kernel finds them in a region for each sequence,
the paged kernel in blocks. Both make the same accesses in the same order, so one position (the number of an access)
stands for the same moment in both runs. Nothing here draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...interop.layouts import LAYOUTS, element_offsets, pack_size
from ...kernels import naive_attention, paged_attention
from ...tracer import trace
from ...tracer.access_record import SECTOR_BYTES, WARP_SIZE, Access, ArrayInfo, Trace
from .source import SourceLines, compared, lines_of_kernel

Array = np.ndarray[Any, Any]
IntArray = np.ndarray[Any, Any]
KERNELS = ("naive", "paged")
MAX_ACCESSES = 400_000  # the tracer needs a few seconds for so many
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The call to walk through: one query token for each sequence, as in a decode step."""

    tokens: tuple[int, ...] = (6, 3)  # keys of each sequence
    block_size: int = 4
    num_heads: int = 2
    num_kv_heads: int = 1
    head_size: int = 8
    num_threads: int = 8
    dtype: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError with the option, its value and the bound."""
        for option, value, most in (
            ("--block-size", self.block_size, 64),
            ("--heads", self.num_heads, 64),
            ("--kv-heads", self.num_kv_heads, 64),
            ("--head-size", self.head_size, 256),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{option} is {value}; 1 to {most} is needed")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--heads is {self.num_heads}; a multiple of --kv-heads {self.num_kv_heads} is needed")
        if not 1 <= self.num_threads <= 128 or self.num_threads & (self.num_threads - 1):
            raise ValueError(f"--threads is {self.num_threads}; a power of two from 1 to 128 is needed")
        if not 1 <= len(self.tokens) <= len(LETTERS):
            raise ValueError(f"--tokens names {len(self.tokens)} sequences; 1 to {len(LETTERS)} are needed")
        for count in self.tokens:
            if count < 1:
                raise ValueError(f"--tokens has {count}; at least 1 is needed, the query's own token")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; at least 0 is needed")
        # Each element of K costs two accesses (q and K), each of V three (weight, slot and V).
        expected = 5 * sum(self.tokens) * self.num_heads * self.head_size
        if expected > MAX_ACCESSES:
            raise ValueError(
                f"--tokens {' '.join(map(str, self.tokens))} with {self.num_heads} heads of {self.head_size} make "
                f"about {expected:,} accesses; at most {MAX_ACCESSES:,} can be walked"
            )


@dataclass(frozen=True, slots=True)
class Load:
    """One load or store of a warp: the accesses of its lanes, and what the tracer counts for them."""

    rows: IntArray  # positions of the accesses, one for each lane
    threads: tuple[int, ...]
    bytes: int
    sectors: int


@dataclass(frozen=True, slots=True)
class LayoutCost:
    """What one warp load of K or V moves when the cache has another layout."""

    layout: str
    sectors: int
    used: float  # share of the bytes moved that the lanes asked for
    groups: tuple[tuple[int, ...], ...]  # threads whose element lies in the same sector, by sector
    wide_sectors: int | None  # sectors when each lane loads 16 bytes; None where that makes no sense
    wide_used: float | None
    block_sectors: int  # of all such loads of the CUDA block together


@dataclass(frozen=True)
class KernelRun:
    """One kernel's run: trace, source, and the sequence of each slot."""

    name: str
    sizes: Sizes
    trace: Trace
    code: SourceLines
    owner: dict[int, tuple[int, int | None]]  # slot -> (sequence, position; None: allocated and empty)
    tables: tuple[tuple[int, ...], ...]  # of each sequence: its blocks; naive: its first slot
    shape: tuple[int, int, int, int]  # of the cache, by blocks
    line: IntArray  # the kernel's line of each access; in a device function, the line that calls the function

    def __len__(self) -> int:
        return len(self.trace)

    def info(self, position: int) -> ArrayInfo:
        return self.trace.arrays[int(self.trace.array[position])]

    def access(self, position: int) -> Access:
        return self.trace[position]

    @cached_property
    def _turns(self) -> IntArray:
        return self.trace.turns()

    @property
    def num_slots(self) -> int:
        return self.shape[0] * self.shape[1]

    def slot(self, position: int) -> int | None:
        """The slot that an access to the cache falls in; None for one to another array."""
        if self.info(position).name not in ("keys", "values"):
            return None
        return int(self.trace.index[position]) // (self.shape[2] * self.shape[3])

    def key(self, position: int) -> int:
        """The key of the thread in the tile of the moment."""
        n = self.sizes.num_threads
        # Each tile costs the same number of barriers: 4, and 2 for each halving of the threads.
        tile = max(0, int(self.trace.round[position]) - 1) // (4 + 2 * (n.bit_length() - 1))
        return tile * n + int(self.trace.thread[position])

    def slot_named(self, position: int) -> int | None:
        """The slot that an access to the cache falls in, or that a read of a block table, or of a start, leads to."""
        access, key, block_size = self.access(position), self.key(position), self.sizes.block_size
        if access.array == "block_tables":
            return self.tables[access.block[0]][access.index[-1]] * block_size + key % block_size
        return self.tables[access.block[0]][0] + key if access.array == "starts" else self.slot(position)

    # ---- where the runs of accesses begin

    @cached_property
    def starts(self) -> dict[str, IntArray]:
        """For each kind of step, the positions where it begins."""
        t = self.trace
        answer = {"access": np.arange(len(t))}
        changed = np.zeros(len(t) - 1, dtype=bool)  # each kind of step is also a step of the kinds after it
        for name, column in (("block", t.block), ("round", t.round), ("thread", t.thread), ("line", self.line)):
            changed = changed | (column[1:] != column[:-1])
            answer[name] = np.concatenate([[0], np.flatnonzero(changed) + 1])
        return answer

    def move(self, position: int, kind: str, step: int) -> int:
        """Where the next (step 1) or the previous (step -1) run of this kind begins; else the last or first."""
        starts = self.starts[kind]
        if step > 0:
            place = int(np.searchsorted(starts, position, side="right"))
            return int(starts[place]) if place < len(starts) else position
        return int(starts[max(0, int(np.searchsorted(starts, position, side="left")) - 1)])

    def first_of_block(self, position: int) -> int:
        starts = self.starts["block"]
        return int(starts[int(np.searchsorted(starts, position, side="right")) - 1])

    def rounds(self, position: int) -> int:
        """Rounds with an access in the CUDA block at `position`."""
        mine = self.trace.round[self.trace.block == self.trace.block[position]]
        return int(mine.max()) + 1

    def tour(self) -> list[int]:
        """The first access to each array: a short way through the kernel."""
        return sorted({int(np.argmax(self.trace.array == n)) for n in np.unique(self.trace.array)})

    # ---- counts, up to and with a position, within its CUDA block

    def counts(self, position: int) -> IntArray:
        """[arrays, threads, 2]: reads and writes so far."""
        t, rows = self.trace, slice(self.first_of_block(position), position + 1)
        answer = np.zeros((len(t.arrays), t.num_threads, 2), dtype=np.int64)
        np.add.at(answer, (t.array[rows], t.thread[rows], t.write[rows].astype(int)), 1)
        return answer

    def read_so_far(self, position: int, array: str) -> IntArray:
        """[num_slots]: elements of each slot that the CUDA block has read, of `keys` or `values`."""
        rows = slice(self.first_of_block(position), position + 1)
        mine = self.trace.array[rows] == self.trace.arrays.index(self.trace.info(array))
        elements = np.unique(self.trace.index[rows][mine])
        return np.bincount(elements // (self.shape[2] * self.shape[3]), minlength=self.num_slots)

    def touched(self, position: int) -> tuple[set[int], set[int]]:
        """Flat indices of the current array that this thread, and that other threads, touched before."""
        rows = slice(self.first_of_block(position), position)
        t = self.trace
        same = t.array[rows] == t.array[position]
        own = t.thread[rows] == t.thread[position]
        return set(t.index[rows][same & own].tolist()), set(t.index[rows][same & ~own].tolist())

    # ---- warps

    def load(self, position: int) -> Load:
        """The access at `position`, with those of the other lanes of its warp in the same instruction."""
        t = self.trace
        same = (t.block == t.block[position]) & (t.site == t.site[position]) & (self._turns == self._turns[position])
        rows = np.flatnonzero(same & (t.thread // WARP_SIZE == t.thread[position] // WARP_SIZE))
        counted = t.rows(rows).warp_accesses()
        size, sectors = (counted[0].bytes, counted[0].sectors) if counted else (0, 0)  # shared memory has none
        return Load(rows, tuple(int(i) for i in t.thread[rows]), size, sectors)

    def nearest_load(self, position: int) -> int:
        """The last access to K or V of the CUDA block up to `position`, or the next one after it."""
        t = self.trace
        cached = np.isin(t.array, [t.arrays.index(t.info(name)) for name in ("keys", "values")])
        here = np.flatnonzero(cached & (t.block == t.block[position]))
        before = here[here <= position]
        return int(before[-1]) if len(before) else int(here[0])

    def layout_costs(self, position: int) -> list[LayoutCost]:
        """The warp load at `position` (of K or V) in each layout that has one for this head size."""
        load, info = self.load(position), self.info(position)
        costs = []
        for layout in LAYOUTS:
            try:
                of_keys, of_values = element_offsets(layout, self.shape, info.dtype.itemsize)
            except ValueError:  # head_size is no multiple of x
                continue
            offsets = (of_keys if info.name == "keys" else of_values).ravel()
            costs.append(self._layout_cost(layout, offsets, load, position))
        return costs

    def _layout_cost(self, layout: str, offsets: IntArray, load: Load, position: int) -> LayoutCost:
        """The cost of a load where element i of the cache lies at byte `offsets[i]`.

        The lanes' elements come from the record. The 16-byte form asks for the x elements around each lane's: what
        the lane asks for in its next x - 1 turns, too.
        """
        t, info = self.trace, self.info(position)
        itemsize = info.dtype.itemsize
        elements = t.index[load.rows]
        sectors = offsets[elements] // SECTOR_BYTES
        groups = tuple(
            tuple(thread for thread, sector in zip(load.threads, sectors, strict=True) if sector == shared)
            for shared in np.unique(sectors)
        )
        wide_sectors, wide_used = None, None
        x = pack_size(itemsize)
        if info.name == "keys" and self.shape[3] % x == 0:
            asked = np.unique(offsets[(elements // x * x)[:, None] + np.arange(x)])
            wide_sectors = len(np.unique(asked // SECTOR_BYTES))
            wide_used = len(asked) * itemsize / (wide_sectors * SECTOR_BYTES)
        used = len(np.unique(elements)) * itemsize / (len(groups) * SECTOR_BYTES)
        block = np.flatnonzero((t.block == t.block[position]) & (t.array == t.array[position]))
        loads = np.stack([t.thread[block] // WARP_SIZE, t.site[block], self._turns[block]])  # each of one warp
        block_sectors = np.unique(np.vstack([loads, offsets[t.index[block]] // SECTOR_BYTES]), axis=1).shape[1]
        return LayoutCost(layout, len(groups), used, groups, wide_sectors, wide_used, block_sectors)


@dataclass(frozen=True, slots=True)
class Walk:
    """Both runs. `runs["naive"]` and `runs["paged"]` go in step."""

    sizes: Sizes
    runs: dict[str, KernelRun]

    def __len__(self) -> int:
        return len(self.runs["paged"])


def walk(sizes: Sizes | None = None) -> Walk:
    """Run both kernels on the same sequences. Raises ValueError where the sizes are out of bounds."""
    sizes = sizes or Sizes()
    sizes.check()
    rng = np.random.default_rng(sizes.seed)
    block_size = sizes.block_size
    needed = [-(-count // block_size) for count in sizes.tokens]  # blocks of each sequence
    region = max(needed)  # standard memory reserves the same for every sequence: here the longest
    shape = (len(needed) * region, block_size, sizes.num_kv_heads, sizes.head_size)

    free = iter(rng.permutation(shape[0]).tolist())
    tables = tuple(tuple(next(free) for _ in range(count)) for count in needed)
    starts = tuple((seq * region * block_size,) for seq in range(len(needed)))
    kv = [rng.standard_normal((2, count, *shape[2:])).astype(sizes.dtype) for count in sizes.tokens]
    query = rng.standard_normal((len(needed), sizes.num_heads, sizes.head_size)).astype(sizes.dtype)
    naive: list[Sequence[int]] = [range(first, first + region * block_size) for (first,) in starts]
    paged: list[Sequence[int]] = [
        [block * block_size + i for block in table for i in range(block_size)] for table in tables
    ]
    naive_kv, paged_kv = _filled(shape, naive, kv), _filled(shape, paged, kv)

    block_tables = np.full((len(needed), region), -1, dtype=np.int32)  # -1: padding, never followed
    for seq, table in enumerate(tables):
        block_tables[seq, : len(table)] = table
    seq_lens = np.array(sizes.tokens, dtype=np.int32)
    first_slots = np.array(starts, dtype=np.int32)[:, 0]
    with trace.recording(sizes.num_threads) as traces:
        keys, values = naive_kv.reshape(2, -1, *shape[2:])  # [num_slots, num_kv_heads, head_size]
        naive_attention(query, keys, values, first_slots, seq_lens, backend="trace")
        paged_attention(query, paged_kv[0], paged_kv[1], block_tables, seq_lens, backend="trace")
    sources = [inspect.getsourcelines(each.function) for each in traces]
    runs = {}
    for i, (name, slots, table) in enumerate(zip(KERNELS, (naive, paged), (starts, tables), strict=True)):
        code = compared(name, sources[i], sources[1 - i])
        owner = _owner(slots, sizes.tokens)
        runs[name] = KernelRun(name, sizes, traces[i], code, owner, table, shape, lines_of_kernel(traces[i]))
    return Walk(sizes, runs)


def _filled(shape: tuple[int, int, int, int], slots: Sequence[Sequence[int]], kv: Sequence[Array]) -> Array:
    """[2, *shape]: K and V of each sequence in the first of its `slots`; the other slots stay NaN.

    `kv` has [2, num_tokens, num_kv_heads, head_size] for each sequence. A kernel that reads an empty slot computes NaN.
    """
    caches = np.full((2, *shape), np.nan, dtype=kv[0].dtype)
    for of_seq, of_tokens in zip(slots, kv, strict=True):
        caches.reshape(2, -1, *shape[2:])[:, of_seq[: of_tokens.shape[1]]] = of_tokens
    return caches


def _owner(slots: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[int, tuple[int, int | None]]:
    """Slot -> (sequence, position; None: allocated and empty)."""
    return {
        slot: (seq, position if position < length else None)
        for seq, (of_seq, length) in enumerate(zip(slots, lengths, strict=True))
        for position, slot in enumerate(of_seq)
    }
