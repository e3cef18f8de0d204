"""What the kernel walk walks over: a small attention call, run by both teaching kernels in the tracer.

The two kernels get the same queries, keys and values; the naive one finds them in a region for each sequence,
the paged one in blocks. They make the same accesses in the same order, so one position (the number of an
access) stands for the same moment in both. Nothing here draws.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ...interop.layouts import LAYOUTS, element_offsets, pack_size
from ...kernels import naive_attention, paged_attention
from ...tracer import trace
from ...tracer.access_record import SECTOR_BYTES, WARP_SIZE, Access, ArrayInfo, Trace
from .source import Code, code_of, lines_of_kernel

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
    wide_sectors: int | None  # the same with 16 bytes for each lane at once; None where that makes no sense
    wide_used: float | None
    block_sectors: int  # of all such loads of the CUDA block together


@dataclass(frozen=True)
class KernelRun:
    """One kernel's run: its trace, its source, and whose slots are where."""

    name: str
    sizes: Sizes
    trace: Trace
    code: Code
    owner: dict[int, tuple[int, int | None]]  # slot -> (sequence, position; None: given out and empty)
    tables: tuple[tuple[int, ...], ...]  # of each sequence: its blocks; naive: its first slot
    shape: tuple[int, int, int, int]  # of the cache, by blocks
    line: IntArray  # the kernel's line of each access: for one in a device function, the line that calls it
    _turn: IntArray = field(repr=False)  # how many times the thread was at this place before

    def __len__(self) -> int:
        return len(self.trace)

    def info(self, position: int) -> ArrayInfo:
        return self.trace.arrays[int(self.trace.array[position])]

    def access(self, position: int) -> Access:
        return self.trace[position]

    @property
    def num_slots(self) -> int:
        return self.shape[0] * self.shape[1]

    def slot(self, position: int) -> int | None:
        """The slot that an access to the cache falls in; None for one to another array."""
        if self.info(position).name not in ("keys", "values"):
            return None
        return int(self.trace.index[position]) // (self.shape[2] * self.shape[3])

    # ---- where the runs of accesses begin

    @cached_property
    def starts(self) -> dict[str, IntArray]:
        """For each kind of step, the positions where it begins."""
        t = self.trace
        keys: dict[str, list[IntArray]] = {"block": [t.block]}
        keys["round"] = [*keys["block"], t.round]
        keys["thread"] = [*keys["round"], t.thread]
        keys["line"] = [*keys["thread"], self.line]
        answer = {"access": np.arange(len(t))}
        for name, columns in keys.items():
            rows = np.stack(columns)
            change = (rows[:, 1:] != rows[:, :-1]).any(axis=0)
            answer[name] = np.concatenate([[0], np.flatnonzero(change) + 1])
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
        """The access at `position` together with those that the other lanes of its warp make at once."""
        t = self.trace
        same = (t.block == t.block[position]) & (t.site == t.site[position]) & (self._turn == self._turn[position])
        rows = np.flatnonzero(same & (t.thread // WARP_SIZE == t.thread[position] // WARP_SIZE))
        counted = _rows(t, rows).warp_accesses()
        size, sectors = (counted[0].bytes, counted[0].sectors) if counted else (0, 0)  # shared memory has none
        return Load(rows, tuple(int(i) for i in t.thread[rows]), size, sectors)

    def nearest_load(self, position: int) -> int:
        """The access itself where it reads K or V; else the last such before it in its CUDA block, or the next."""
        t = self.trace
        cached = np.isin(t.array, [t.arrays.index(t.info(name)) for name in ("keys", "values")])
        here = np.flatnonzero(cached & (t.block == t.block[position]))
        before = here[here <= position]
        return int(before[-1]) if len(before) else int(here[0])

    def layout_costs(self, position: int) -> list[LayoutCost]:
        """The warp load at `position` (of K or V) in each layout that has one for this head size.

        The lanes' (slot, head, element) come from the record; where those lie comes from `layouts.py`.
        The 16-byte form asks for the x elements around each lane's: what its next x - 1 turns ask for, too.
        """
        load, info = self.load(position), self.info(position)
        elements = self.trace.index[load.rows]
        itemsize = info.dtype.itemsize
        x = pack_size(itemsize)
        wide = elements // x * x if info.name == "keys" and self.shape[3] % x == 0 else None
        t = self.trace
        mine = np.flatnonzero((t.block == t.block[position]) & (t.array == t.array[position]))
        turns = np.stack([t.thread[mine] // WARP_SIZE, t.site[mine], self._turn[mine]])  # each a load of a warp
        answer = []
        for layout in LAYOUTS:
            try:
                offsets = element_offsets(layout, self.shape, itemsize)[info.name == "values"].ravel()
            except ValueError:  # head_size is no multiple of x
                continue
            sector = offsets[elements] // SECTOR_BYTES
            groups = tuple(
                tuple(thread for thread, its in zip(load.threads, sector, strict=True) if its == one)
                for one in np.unique(sector)
            )
            wide_sectors, wide_used = None, None
            if wide is not None:
                asked = np.unique(offsets[wide[:, None] + np.arange(x)])
                wide_sectors = len(np.unique(asked // SECTOR_BYTES))
                wide_used = len(asked) * itemsize / (wide_sectors * SECTOR_BYTES)
            used = len(np.unique(elements)) * itemsize / (len(groups) * SECTOR_BYTES)
            every = np.unique(np.vstack([turns, offsets[t.index[mine]] // SECTOR_BYTES]), axis=1).shape[1]
            answer.append(LayoutCost(layout, len(groups), used, groups, wide_sectors, wide_used, every))
        return answer


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
    num_seqs, block_size, lens = len(sizes.tokens), sizes.block_size, sizes.tokens
    needed = [-(-n // block_size) for n in lens]  # blocks of each sequence
    region = max(needed)  # standard memory reserves the same for every sequence: here the longest
    row = (sizes.num_kv_heads, sizes.head_size)
    shape = (num_seqs * region, block_size, *row)

    free = iter(rng.permutation(shape[0]).tolist())
    tables = tuple(tuple(next(free) for _ in range(count)) for count in needed)
    starts = tuple((s * region * block_size,) for s in range(num_seqs))
    block_tables = np.full((num_seqs, region), -1, dtype=np.int32)  # -1: padding, never followed
    key_cache = np.full(shape, np.nan, dtype=sizes.dtype)  # NaN: a read of what nobody wrote would show
    value_cache, keys, values = key_cache.copy(), key_cache.copy(), key_cache.copy()
    paged_owner: dict[int, tuple[int, int | None]] = {}
    naive_owner: dict[int, tuple[int, int | None]] = {}
    by_slot = (shape[0] * block_size, *row)
    for s, count in enumerate(lens):
        block_tables[s, : needed[s]] = tables[s]
        k, v = rng.standard_normal((2, count, *row)).astype(sizes.dtype)
        for p in range(region * block_size):
            held = p if p < count else None
            naive_owner[starts[s][0] + p] = (s, held)
            if p < needed[s] * block_size:
                paged_owner[tables[s][p // block_size] * block_size + p % block_size] = (s, held)
        for owner, cache, source in (
            (paged_owner, key_cache, k), (paged_owner, value_cache, v),
            (naive_owner, keys, k), (naive_owner, values, v),
        ):  # fmt: skip
            flat = cache.reshape(by_slot)
            for slot, (who, position) in owner.items():
                if who == s and position is not None:
                    flat[slot] = source[position]
    query = rng.standard_normal((num_seqs, sizes.num_heads, sizes.head_size)).astype(sizes.dtype)
    seq_lens = np.array(lens, dtype=np.int32)
    first = np.array([start for (start,) in starts], dtype=np.int32)
    with trace.recording(sizes.num_threads) as traces:
        naive_attention(query, keys.reshape(by_slot), values.reshape(by_slot), first, seq_lens, backend="trace")
        paged_attention(query, key_cache, value_cache, block_tables, seq_lens, backend="trace")
    sources = [inspect.getsourcelines(one.function) for one in traces]
    codes = [code_of(name, sources[i], sources[1 - i]) for i, name in enumerate(KERNELS)]
    runs = {}
    for name, one, code, owner, table in zip(
        KERNELS, traces, codes, (naive_owner, paged_owner), (starts, tables), strict=True
    ):
        runs[name] = KernelRun(name, sizes, one, code, owner, table, shape, lines_of_kernel(one), _turns(one))
    return Walk(sizes, runs)


# ---- the record, read further


def _rows(one: Trace, rows: IntArray) -> Trace:
    columns = ("block", "round", "thread", "line", "site", "array", "index", "write")
    return replace(one, **{name: getattr(one, name)[rows] for name in columns})


def _turns(one: Trace) -> IntArray:
    """For each access, how many times its thread was at the same place of the kernel before."""
    order = np.lexsort((one.site, one.thread, one.block))  # stable
    who = np.stack([one.block, one.thread, one.site])[:, order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (who[:, 1:] != who[:, :-1]).any(axis=0)
    place = np.arange(len(order))
    turn = np.empty(len(order), dtype=np.int64)
    turn[order] = place - np.maximum.accumulate(np.where(fresh, place, 0))
    return turn
