"""What can be asked of one kernel's run: slot, thread and line of each access, counts, and the loads of the warps.

Nothing here draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...tracer.access_record import WARP_SIZE, Access, ArrayInfo, Trace
from .sizes import Sizes
from .source import SourceLines

IntArray = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Load:
    """One load or store of a warp: the accesses of its lanes, and what the tracer counts for them."""

    rows: IntArray  # positions of the accesses, one for each lane
    threads: tuple[int, ...]
    bytes: int
    sectors: int


@dataclass(frozen=True, eq=False)
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
    def turns(self) -> IntArray:
        """For each access, how many times its thread was at the same place before."""
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
        same = (t.block == t.block[position]) & (t.site == t.site[position]) & (self.turns == self.turns[position])
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
