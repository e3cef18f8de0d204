"""Memory swapping: contiguous regions of today's size, and whole sequences moved when they outgrow them.

The middle way of the comparison: nothing is reserved for a future that may not come, but K and V stay in one
piece, so growth costs moves on the device and trips to host memory. Every slot that travels is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...timeline.events import (
    Log,
    PoolOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    SequenceFreed,
    tokens_appended,
)
from .block_pool import OutOfBlocks
from .manager import OpenPiece, OutOfHostBlocks, Snapshot, Transfer
from .regions import Region, RegionPool


class SwappingManager:
    """A `KVCacheManager` and `Swappable`. Regions are rounded up to `granule` slots."""

    paged = False

    def __init__(self, num_slots: int, num_host_slots: int = 0, *, granule: int = 16, log: Log | None = None) -> None:
        """`granule` is the slack of a region: with 1, every token of every sequence may mean a move."""
        for name, value, least in (
            ("num_slots", num_slots, 1),
            ("num_host_slots", num_host_slots, 0),
            ("granule", granule, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; at least {least} is needed")
        self.num_slots = num_slots
        self.granule = granule
        self.pool = RegionPool(num_slots)
        self.host_pool = RegionPool(num_host_slots)
        self.regions: dict[int, Region] = {}
        self.slots_moved = 0  # on the device, since the beginning
        self.slots_swapped = 0  # between device and host, both ways
        self.log = log
        if log:
            log(PoolOpened("swapping", num_slots, 1, num_host_slots, ()))

    def region_size(self, num_tokens: int) -> int:
        """Slots of a region for `num_tokens` today: whole granules, but never more than there are."""
        return min(-(-num_tokens // self.granule) * self.granule, max(self.num_slots, num_tokens))

    def most_slots(self, prompt_len: int, max_tokens: int, n: int = 1) -> int:
        return self.region_size(max_tokens)  # samples are sequences of their own here, and can take turns

    def admit(self, seq_id: int, tokens: Sequence[int], max_tokens: int) -> int:
        size = self.region_size(len(tokens))
        region = self.regions[seq_id] = Region(self.pool.allocate(size), size)
        if self.log:
            self.log(RegionPlaced(seq_id, region.start, size))
        return 0

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        ((seq_id, count),) = appends  # no forks here, so a group is one sequence
        region = self.regions[seq_id]
        transfers = self._make_room(seq_id, region, region.length + count)
        region.length += count
        if self.log:
            self.log(tokens_appended(seq_id, count))
        return transfers

    def _make_room(self, seq_id: int, region: Region, length: int) -> list[Transfer]:
        """Grow in place, or move to a hole that is large enough. Raises OutOfBlocks without either.

        Its own slots count as part of the hole: a sequence that is alone can always grow, wherever it lies.
        """
        if length <= region.size:
            return []
        size = self.region_size(length)
        transfers = []
        if not self.pool.grow(region.start, region.size, size - region.size):
            start = self.pool.move(region.start, region.size, size)
            if region.length:
                transfers = [Transfer("move", region.start, start, region.length)]
                self.slots_moved += region.length
            region.start = start
        region.size = size
        if self.log:
            self.log(RegionPlaced(seq_id, region.start, size))
        return transfers

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        """Nothing to do: there is no prefix cache."""

    def free(self, seq_id: int) -> None:
        region = self.regions.pop(seq_id)
        (self.host_pool if region.on_host else self.pool).release(region.start, region.size)
        if self.log:
            self.log(SequenceFreed(seq_id))

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        (seq_id,) = seq_ids
        region = self.regions[seq_id]
        try:
            start = self.host_pool.allocate(region.length)
        except OutOfBlocks as error:
            raise OutOfHostBlocks(f"host memory has {error}") from None
        transfer = Transfer("swap_out", region.start, start, region.length)
        self.pool.release(region.start, region.size)
        self.regions[seq_id] = Region(start, region.length, region.length, on_host=True)
        self.slots_swapped += region.length
        if self.log:
            self.log(RegionSwappedOut(seq_id, start, region.length))
        return [transfer]

    def swap_in(self, seq_ids: Sequence[int]) -> list[Transfer]:
        (seq_id,) = seq_ids
        region = self.regions[seq_id]
        size = self.region_size(region.length + 1)  # it comes back because it wants to grow
        start = self.pool.allocate(size)
        self.host_pool.release(region.start, region.size)
        self.regions[seq_id] = Region(start, size, region.length)
        self.slots_swapped += region.length
        if self.log:
            self.log(RegionSwappedIn(seq_id, start, size))
        return [Transfer("swap_in", region.start, start, region.length)]

    def length(self, seq_id: int) -> int:
        return self.regions[seq_id].length

    def start(self, seq_id: int) -> int:
        """The first slot of the sequence's region."""
        return self.regions[seq_id].start

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        start = self.regions[seq_id].start + first
        return list(range(start, start + count))

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        pieces = [
            OpenPiece(seq_id, length=region.length, tokens=region.length, slots=region.size)
            for seq_id, region in self.regions.items()
            if not region.on_host
        ]
        external, free = self.pool.split_free(self.region_size(next_request[0]) if next_request else 0)
        return Snapshot(0, pieces, external, free)

    def check_integrity(self) -> None:
        self.pool.check_integrity(self.regions)
        self.host_pool.check_integrity(self.regions, on_host=True)
