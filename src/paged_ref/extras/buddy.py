"""Buddy allocation (Knowlton 1965): regions are powers of two, so that two halves always join again.

What Kwon et al. 2023, §6.1, assume of the systems they compare with. Freeing is quick and holes join well, at the
price of rounding each region up; the paper's Fig. 2 counts that under external fragmentation, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.checks import plural
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.regions import Region, RegionPool


class BuddyPool(RegionPool):
    """A RegionPool whose regions lie in aligned pieces of 1, 2, 4, 8 ... slots.

    Invariant: a piece is free, or holds one region, or is cut into two halves; never are both halves free. Its regions
    neither grow nor move.
    """

    def __init__(self, num_slots: int) -> None:
        """`num_slots` need not be a power of two: the pool is the fewest pieces that are, the largest first."""
        super().__init__(num_slots)

    def clear(self) -> None:
        self.free: dict[int, set[int]] = {}  # size of the piece -> where such pieces begin
        start = 0
        for bit in reversed(range(self.num_slots.bit_length())):
            self.free[1 << bit] = set()
            if self.num_slots >> bit & 1:
                self.free[1 << bit].add(start)
                start += 1 << bit

    def slots_taken(self, size: int) -> int:
        return 1 << max(0, size - 1).bit_length()

    def allocate(self, size: int) -> int:
        """The start of a new region, in the smallest piece that is large enough. Raises OutOfBlocks."""
        piece = wanted = self.slots_taken(size)
        while not self.free.get(piece):
            piece *= 2
            if piece > self.num_slots:
                raise OutOfBlocks(f"no piece of {plural(wanted, 'slot')} for {size}")
        start = min(self.free[piece])
        self.free[piece].remove(start)
        while piece > wanted:  # keep the lower half, free the upper one
            piece //= 2
            self.free[piece].add(start + piece)
        return start

    def release(self, start: int, size: int) -> None:
        """Take a region back; its piece joins the other half as long as that half is free."""
        piece = self.slots_taken(size)
        while start ^ piece in self.free[piece]:
            self.free[piece].remove(start ^ piece)
            start &= ~piece
            piece *= 2
        self.free[piece].add(start)

    def split_free(self, needed: int) -> tuple[int, int]:
        """Slots that are in no region: those that a region of `needed` slots cannot have, and the others.

        The first are pieces that are too small. What rounding up costs is counted by the manager, which knows
        the regions.
        """
        least = self.slots_taken(needed) if needed else 0
        small = sum(size * len(starts) for size, starts in self.free.items() if size < least)
        return small, sum(size * len(starts) for size, starts in self.free.items()) - small

    def check_integrity(self, regions: Iterable[Region]) -> None:
        """Raise AssertionError unless pieces in use and free ones tile the slots, each aligned to its size."""
        pieces = [(start, size) for size, starts in self.free.items() for start in starts]
        pieces += [(region.start, self.slots_taken(region.size)) for region in regions]
        position = 0
        for start, size in sorted(pieces):
            if start != position or start % size:
                raise AssertionError(f"slots {position} to {start} belong to nothing, or to two pieces")
            position += size
        if position != self.num_slots:
            raise AssertionError(f"the pieces cover {position} of {self.num_slots} slots")
        for size, starts in self.free.items():
            if any(start ^ size in starts for start in starts):
                raise AssertionError(f"two free halves of {size} slots were not joined")
