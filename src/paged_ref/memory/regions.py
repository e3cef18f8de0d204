"""Contiguous memory: first-fit regions in one array of slots, as a plain memory allocator does it."""

from __future__ import annotations

from bisect import bisect_left

from .block_pool import OutOfBlocks


class RegionPool:
    """Slots 0 to `num_slots - 1`, cut into regions and the holes between them.

    Invariant: the holes are sorted, do not touch each other, and with the regions cover every slot once.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; at least 1 is needed")
        self.num_slots = num_slots
        self.holes: list[tuple[int, int]] = [(0, num_slots)]  # (start, size), by start

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
        raise OutOfBlocks(f"no hole of {size} slots; {free} are free, in {len(self.holes)} holes")

    def release(self, start: int, size: int) -> None:
        """Give a region back; it joins the holes that it touches."""
        i = bisect_left(self.holes, (start, 0))
        stop = start + size
        if i < len(self.holes) and self.holes[i][0] == stop:
            stop += self.holes.pop(i)[1]
        if i > 0 and sum(self.holes[i - 1]) == start:
            i -= 1
            start = self.holes.pop(i)[0]
        self.holes.insert(i, (start, stop - start))

    def check_integrity(self, regions: list[tuple[int, int]]) -> None:
        """Raise AssertionError unless `regions` (start, size) and the holes tile the slots exactly."""
        position = 0
        for start, size in sorted(regions + self.holes):
            if start != position:
                raise AssertionError(f"slots {position} to {start} belong to nothing, or to two regions")
            position += size
        if position != self.num_slots:
            raise AssertionError(f"regions and holes cover {position} of {self.num_slots} slots")
        if any(sum(a) == b[0] for a, b in zip(self.holes, self.holes[1:], strict=False)):
            raise AssertionError("two holes touch and were not joined")
