"""The record of all reads and writes of a traced kernel, and what can be asked of it.

A row is one access: to one element of one array, by one thread, at one line of the kernel. The rows stand in the
order in which the tracer ran them. Only `trace.run` makes a `Trace`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

WARP_SIZE = 32
SECTOR_BYTES = 32  # the unit in which a GPU moves global memory

IntArray = np.ndarray[Any, np.dtype[np.int32]]


class Dim3(NamedTuple):
    """The size of a grid or a CUDA block, or a place in one."""

    x: int
    y: int = 1
    z: int = 1

    def place(self, number: int) -> Dim3:
        """The place of the CUDA block or thread with this number; x runs fastest."""
        return Dim3(number % self.x, number // self.x % self.y, number // (self.x * self.y))


class ArrayInfo(NamedTuple):
    """An array that the kernel touches. The name is that of the kernel's parameter or variable."""

    name: str
    space: str  # "global", "shared" or "local"
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Access:
    """One row of the record, with names and indices in place of numbers."""

    block: tuple[int, int, int]
    round: int  # barriers that the CUDA block had passed
    thread: int  # number within the CUDA block; x runs fastest
    line: int  # of the kernel's file
    array: str
    index: tuple[int, ...]
    write: bool


class WarpAccess(NamedTuple):
    """One load or store of a warp: what its lanes ask for in one instruction, and what that moves."""

    block: int
    warp: int
    line: int
    array: str
    write: bool
    lanes: int  # threads that took part
    bytes: int  # different bytes that these threads asked for
    sectors: int  # 32-byte sectors that hold those bytes; the fewest possible is bytes / 32, rounded up


@dataclass(frozen=True)
class Trace:
    """The record of one kernel launch. The columns are arrays with one entry for each access."""

    kernel: str
    function: Any  # the Python function of the kernel; inspect.getsourcelines shows it
    grid: Dim3
    block_dim: Dim3
    arrays: tuple[ArrayInfo, ...]
    block: IntArray  # number of the CUDA block in the grid; x runs fastest
    round: IntArray
    thread: IntArray
    line: IntArray
    site: IntArray  # place in the kernel's bytecode: tells apart two accesses in one line
    array: IntArray  # position in `arrays`
    index: IntArray  # flat index, row-major
    write: np.ndarray[Any, np.dtype[np.bool_]]

    @property
    def num_blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def num_threads(self) -> int:
        return math.prod(self.block_dim)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> Access:
        info = self.arrays[self.array[row]]
        index = tuple(int(i) for i in np.unravel_index(int(self.index[row]), info.shape))
        block = self.grid.place(int(self.block[row]))
        thread, line, done = int(self.thread[row]), int(self.line[row]), int(self.round[row])
        return Access(block, done, thread, line, info.name, index, bool(self.write[row]))

    def __iter__(self) -> Iterator[Access]:
        return (self[row] for row in range(len(self)))

    def info(self, name: str) -> ArrayInfo:
        """The array of this name. Raises KeyError with the names there are."""
        for info in self.arrays:
            if info.name == name:
                return info
        raise KeyError(f"the kernel touches no array {name!r}; it has {', '.join(a.name for a in self.arrays)}")

    def select(
        self,
        array: str | None = None,
        *,
        write: bool | None = None,
        block: int | None = None,
        thread: int | None = None,
        round: int | None = None,
        line: int | None = None,
    ) -> Trace:
        """The accesses that meet all the conditions given, in the same order."""
        keep = np.ones(len(self), dtype=bool)
        if array is not None:
            keep &= self.array == self.arrays.index(self.info(array))
        wanted = {"write": write, "block": block, "thread": thread, "round": round, "line": line}
        for column, value in wanted.items():
            if value is not None:
                keep &= getattr(self, column) == value
        return self.rows(keep)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Reads and writes of each array."""
        answer = {}
        for number, info in enumerate(self.arrays):
            writes = self.write[self.array == number]
            answer[info.name] = (int((~writes).sum()), int(writes.sum()))
        return answer

    def counts(self, array: str, *, write: bool = False) -> IntArray:
        """In the array's own shape: how many times each element was read (or written)."""
        shape, rows = self.info(array).shape, self.select(array, write=write)
        return np.bincount(rows.index, minlength=int(np.prod(shape))).reshape(shape).astype(np.int32)

    def slots(self, array: str) -> IntArray:
        """The slot that each access to a KV cache falls in.

        `array` is a cache `[..., num_kv_heads, head_size]`, by slots or by blocks. The block of a slot is
        `slot // block_size`, the offset in it `slot % block_size`.
        """
        shape = self.info(array).shape
        slot: IntArray = self.select(array).index // (shape[-2] * shape[-1])
        return slot

    def warp_accesses(self, array: str | None = None, *, write: bool | None = None) -> list[WarpAccess]:
        """Loads and stores of global memory as the warps make them, with the sectors that each one moves.

        Lanes of a warp that are at the same place of the kernel for the k-th time access together, as they
        do on a GPU while the warp stays together. An array is taken to begin at a sector's border.
        """
        is_global = np.array([info.space == "global" for info in self.arrays], dtype=bool)
        rows = self.select(array, write=write)
        rows = rows.rows(is_global[rows.array])
        if not len(rows):
            return []
        turn = rows.turns()
        warp = rows.thread // WARP_SIZE
        together = np.lexsort((turn, rows.site, warp, rows.block))
        key = np.stack([rows.block, warp, rows.site, rows.array, rows.write, turn])[:, together]
        borders = np.flatnonzero((key[:, 1:] != key[:, :-1]).any(axis=0)) + 1
        groups = np.split(together, borders)
        groups.sort(key=lambda group: int(group[0]))  # by the first lane's access: the order of the run
        address = rows._addresses()
        answer = []
        for group in groups:
            first, info = int(group[0]), self.arrays[rows.array[group[0]]]
            asked = np.unique(address[group])
            last = asked + info.dtype.itemsize - 1
            sectors = np.unique(np.concatenate([asked // SECTOR_BYTES, last // SECTOR_BYTES]))
            answer.append(
                WarpAccess(
                    int(rows.block[first]), int(warp[first]), int(rows.line[first]), info.name,
                    bool(rows.write[first]), len(group), len(asked) * info.dtype.itemsize, len(sectors),
                )
            )  # fmt: skip
        return answer

    def turns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For each access, how many times its thread was at the same place of the kernel before."""
        order = np.lexsort((self.site, self.thread, self.block))  # stable
        key = np.stack([self.block, self.thread, self.site, self.array, self.write])[:, order]
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = (key[:, 1:] != key[:, :-1]).any(axis=0)
        place = np.arange(len(order))
        turns = np.empty(len(order), dtype=np.int64)
        turns[order] = place - np.maximum.accumulate(np.where(fresh, place, 0))
        return turns

    def rows(self, keep: Any) -> Trace:
        """The accesses that `keep` names, by their numbers or by a mask."""
        columns = ("block", "round", "thread", "line", "site", "array", "index", "write")
        return replace(self, **{name: getattr(self, name)[keep] for name in columns})

    def _addresses(self) -> Any:
        """Byte address of each access, from the start of its array."""
        address = np.zeros(len(self), dtype=np.int64)
        for number, info in enumerate(self.arrays):
            here = self.array == number
            for i, stride in zip(np.unravel_index(self.index[here], info.shape), info.strides, strict=True):
                address[here] += i * stride
        return address
