"""Memory swapping: contiguous regions of today's size, and whole sequences moved when they outgrow them.

The middle way of the comparison: nothing is reserved for tokens that may not come, but K and V stay in one piece, so
growth costs moves on the device and trips to host memory. Every slot that travels is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.checks import require
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import OutOfHostBlocks, Transfer
from ..core.memory.regions import Region, RegionManager, RegionPool
from ..core.memory.usage import Snapshot


class SwappingManager(RegionManager):
    """Regions are rounded up to `alignment` slots. Swapped sequences have their region in host memory."""

    can_swap = True

    def __init__(self, num_slots: int, num_host_slots: int = 0, alignment: int = 16) -> None:
        """`alignment` is the slack of a region: with 1, every token of every sequence may mean a move."""
        require(num_slots=(num_slots, 1), num_host_slots=(num_host_slots, 0), alignment=(alignment, 1))
        super().__init__(RegionPool(num_slots))
        self.alignment = alignment
        self.host_pool = RegionPool(num_host_slots)
        self.swapped: dict[int, Region] = {}  # on the host
        self.slots_moved = 0  # on the device, since the beginning
        self.slots_swapped = 0  # between device and host, both ways

    def region_size(self, num_tokens: int) -> int:
        """Slots of a region for `num_tokens` today: rounded up, but never more than there are."""
        return min(-(-num_tokens // self.alignment) * self.alignment, max(self.num_slots, num_tokens))

    def max_slots_needed(self, prompt_len: int, max_len: int, n: int = 1) -> int:
        return self.region_size(max_len)  # samples are sequences of their own here, and can take turns

    def admit(self, seq_id: int, tokens: Sequence[int], max_len: int, spare: int = 0) -> int:
        size = self.region_size(len(tokens))
        self.regions[seq_id] = Region(self.pool.allocate(size), size)
        return 0

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        outgrown: dict[int, Region] = {}
        for seq_id, count in appends:
            region = self.regions[seq_id]
            if region.length + count > region.size:
                outgrown[seq_id] = region
        transfers = self._enlarge_all(outgrown, dict(appends)) if outgrown else []
        for seq_id, count in appends:
            self.regions[seq_id].length += count
        return transfers

    def _enlarge_all(self, outgrown: Mapping[int, Region], counts: Mapping[int, int]) -> list[Transfer]:
        """Make room for `counts` more tokens in each of these regions, or raise OutOfBlocks and change nothing."""
        holes, transfers = self.pool.holes.copy(), []
        try:
            for seq_id in outgrown:
                transfers += self._enlarge(seq_id, counts[seq_id])
        except OutOfBlocks:
            self.pool.holes = holes
            self.regions.update(outgrown)
            raise
        self.slots_moved += sum(transfer.count for transfer in transfers)
        return transfers

    def _enlarge(self, seq_id: int, count: int) -> list[Transfer]:
        """Grow a region in place for `count` more tokens, or move it to a hole that is large enough. Raises OutOfBlocks
        without either.

        The region's own slots count as part of the hole: a sequence that is alone can always grow, wherever it lies.
        """
        old = self.regions[seq_id]
        start, size = old.start, self.region_size(old.length + count)
        if not self.pool.grow(old.start, old.size, size - old.size):
            start = self.pool.move(old.start, old.size, size)
        self.regions[seq_id] = Region(start, size, old.length)
        return [Transfer("move", old.start, start, old.length)] if start != old.start and old.length else []

    def free(self, seq_id: int) -> None:
        if seq_id in self.regions:
            super().free(seq_id)
        else:
            region = self.swapped.pop(seq_id)
            self.host_pool.release(region.start, region.size)

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        lengths = [self.regions[seq_id].length for seq_id in seq_ids]
        try:
            starts = _allocate_all(self.host_pool, lengths)
        except OutOfBlocks as error:
            raise OutOfHostBlocks(f"host memory has {error}") from None
        transfers = []
        for seq_id, start, length in zip(seq_ids, starts, lengths, strict=True):
            transfers.append(Transfer("swap_out", self.regions[seq_id].start, start, length))
            super().free(seq_id)
            self.swapped[seq_id] = Region(start, length, length)
        self.slots_swapped += sum(lengths)
        return transfers

    def swap_in(self, seq_ids: Sequence[int], spare: int = 0) -> list[Transfer]:
        lengths = [self.swapped[seq_id].length for seq_id in seq_ids]
        sizes = [self.region_size(length + 1) for length in lengths]  # they come back because they want to grow
        starts = _allocate_all(self.pool, sizes)
        transfers = []
        for seq_id, start, size, length in zip(seq_ids, starts, sizes, lengths, strict=True):
            transfers.append(Transfer("swap_in", self.swapped[seq_id].start, start, length))
            self.free(seq_id)
            self.regions[seq_id] = Region(start, size, length)
        self.slots_swapped += sum(lengths)
        return transfers

    def clear(self) -> None:
        super().clear()
        self.swapped.clear()
        self.host_pool.clear()

    def length(self, seq_id: int) -> int:
        return (self.regions.get(seq_id) or self.swapped[seq_id]).length

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        external, free = self.pool.split_free(self.region_size(next_request[0]) if next_request else 0)
        return Snapshot(0, self.partial_allocations(), external, free)

    def check_integrity(self) -> None:
        super().check_integrity()
        self.host_pool.check_integrity(self.swapped.values())


def _allocate_all(pool: RegionPool, sizes: Sequence[int]) -> list[int]:
    """The starts of new regions of these sizes; all of them, or OutOfBlocks."""
    holes = pool.holes.copy()
    try:
        return [pool.allocate(size) for size in sizes]
    except OutOfBlocks:
        pool.holes = holes
        raise
