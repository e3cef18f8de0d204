"""Contiguous memory: first-fit regions in one array of slots, as a plain memory allocator places them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from ..checks import plural, require
from .block_pool import OutOfBlocks
from .manager import KVCacheManager
from .usage import PartialAllocation


@dataclass(slots=True)
class Region:
    """Where one sequence lies."""

    start: int
    size: int  # slots
    length: int = 0  # of these, slots that hold a token


class RegionPool:
    """Slots 0 to `num_slots - 1`, cut into regions and the holes between them.

    Invariant: the holes are sorted, do not touch each other, and with the regions cover every slot once.
    """

    def __init__(self, num_slots: int) -> None:
        require(num_slots=(num_slots, 0))
        self.num_slots = num_slots
        self.clear()

    def clear(self) -> None:
        """Every slot is free."""
        self.holes: list[tuple[int, int]] = [(0, self.num_slots)] if self.num_slots else []  # (start, size)

    def slots_taken(self, size: int) -> int:
        """Slots that a region of `size` takes from the pool."""
        return size

    def allocate(self, size: int) -> int:
        """The start of a new region: the first hole that is large enough. Raises OutOfBlocks."""
        for i, (start, hole) in enumerate(self.holes):
            if hole >= size:
                if hole == size:
                    del self.holes[i]
                else:
                    self.holes[i] = (start + size, hole - size)
                return start
        free = sum(hole for _, hole in self.holes)
        raise OutOfBlocks(f"no hole of {plural(size, 'slot')}: {free} free, in {plural(len(self.holes), 'hole')}")

    def grow(self, start: int, size: int, extra: int) -> bool:
        """Lengthen the region at `start` in place, if the hole behind it has `extra` slots. False if not."""
        i = bisect_left(self.holes, (start + size, 0))
        if i == len(self.holes) or self.holes[i][0] != start + size or self.holes[i][1] < extra:
            return False
        hole_start, hole = self.holes[i]
        self.holes[i : i + 1] = [(hole_start + extra, hole - extra)] if hole > extra else []
        return True

    def move(self, start: int, size: int, new_size: int) -> int:
        """Give a region up for one of `new_size` slots, which may overlap it. Raises OutOfBlocks."""
        before = self.holes.copy()
        self.release(start, size)
        try:
            return self.allocate(new_size)
        except OutOfBlocks:
            self.holes = before
            raise

    def release(self, start: int, size: int) -> None:
        """Take a region back; it joins the holes that it touches."""
        i = bisect_left(self.holes, (start, 0))
        stop = start + size
        if i < len(self.holes) and self.holes[i][0] == stop:
            stop += self.holes.pop(i)[1]
        if i > 0 and sum(self.holes[i - 1]) == start:
            i -= 1
            start = self.holes.pop(i)[0]
        self.holes.insert(i, (start, stop - start))

    def split_free(self, needed: int) -> tuple[int, int]:
        """Free slots in holes smaller than `needed`, and in the others."""
        small = sum(size for _, size in self.holes if size < needed)
        return small, sum(size for _, size in self.holes) - small

    def check_integrity(self, regions: Iterable[Region]) -> None:
        """Raise AssertionError unless `regions` and the holes tile the slots exactly."""
        position = 0
        for start, size in sorted([*((region.start, region.size) for region in regions), *self.holes]):
            if start != position:
                raise AssertionError(f"slots {position} to {start} belong to nothing, or to two regions")
            position += size
        if position != self.num_slots:
            raise AssertionError(f"regions and holes cover {position} of {self.num_slots} slots")
        if any(sum(a) == b[0] for a, b in zip(self.holes, self.holes[1:], strict=False)):
            raise AssertionError("two holes touch and were not joined")


class RegionManager(KVCacheManager):
    """What the managers share that keep each sequence in one region."""

    paged = False
    block_size = 1

    def __init__(self, pool: RegionPool) -> None:
        self.pool = pool
        self.num_slots = pool.num_slots
        self.regions: dict[int, Region] = {}  # on the device

    def free(self, seq_id: int) -> None:
        region = self.regions.pop(seq_id)
        self.pool.release(region.start, region.size)

    def clear(self) -> None:
        self.regions.clear()
        self.pool.clear()

    def length(self, seq_id: int) -> int:
        return self.regions[seq_id].length

    def placement(self, seq_id: int) -> list[int]:
        return [self.regions[seq_id].start]

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        start = self.regions[seq_id].start + first
        return list(range(start, start + count))

    def partial_allocations(self) -> list[PartialAllocation]:
        """Every region, for a snapshot."""
        return [PartialAllocation(seq_id, r.length, r.length, r.size) for seq_id, r in self.regions.items()]

    def check_integrity(self) -> None:
        for seq_id, region in self.regions.items():
            if region.length > region.size:
                raise AssertionError(f"sequence {seq_id} of length {region.length} has a region of {region.size}")
        self.pool.check_integrity(self.regions.values())
