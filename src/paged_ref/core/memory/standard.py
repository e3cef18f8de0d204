"""Standard memory management: one contiguous region for each sequence, reserved for its whole life.

What serving systems did before paging. How much is reserved is a choice, and the paper measures three:
`max` (the longest sequence that the model allows), `pow2` (the prompt and the output rounded up to a power
of two) and `exact` (an oracle that knows the output's length). Kwon et al. 2023, §6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...extras.buddy import BuddyPool
from ...timeline.events import Log, PoolOpened, RegionPlaced, SequenceFreed, tokens_appended
from .manager import OpenPiece, Snapshot, Transfer
from .regions import Region, RegionPool

Reserve = Literal["max", "pow2", "exact"]
Allocator = Literal["first fit", "buddy"]


class StandardManager:
    """A `KVCacheManager` that reserves a region for each sequence and never moves anything."""

    paged = False

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        reserve: Reserve = "max",
        log: Log | None = None,
        *,
        allocator: Allocator = "first fit",
    ) -> None:
        """`max_model_len` is the longest sequence; `max` reserves that many slots for each.

        `allocator`: how it finds a region's place. "buddy" is what the paper assumes of others; "first fit"
        wastes less.
        """
        if allocator not in ("first fit", "buddy"):
            raise ValueError(f"allocator is {allocator!r}; known are first fit, buddy")
        if reserve not in ("max", "pow2", "exact"):
            raise ValueError(f"reserve is {reserve!r}; known are max, pow2, exact")
        if max_model_len < 1:
            raise ValueError(f"max_model_len is {max_model_len}; at least 1 is needed")
        if reserve == "max" and num_slots < max_model_len:
            raise ValueError(
                f"the standard manager reserves max_model_len = {max_model_len} slots for each sequence; "
                f"the KV cache has {num_slots}"
            )
        self.num_slots = num_slots
        self.reserve = reserve
        self.max_model_len = max_model_len
        self.pool: RegionPool | BuddyPool = (BuddyPool if allocator == "buddy" else RegionPool)(num_slots)
        self.regions: dict[int, Region] = {}
        self.log = log
        if log:
            log(PoolOpened("standard", num_slots, 1, 0, ()))

    def region_size(self, num_tokens: int, max_tokens: int) -> int:
        """Slots to reserve for a prompt of `num_tokens` that grows to at most `max_tokens`."""
        if self.reserve == "max":
            return max(self.max_model_len, max_tokens)
        if self.reserve == "exact":
            return max_tokens
        output = max(1, max_tokens - num_tokens)
        return min(num_tokens + (1 << (output - 1).bit_length()), max(self.max_model_len, max_tokens))

    def most_slots(self, prompt_len: int, max_tokens: int, n: int = 1) -> int:
        # Never more than one region at once: samples are sequences of their own here, and can take turns.
        size = self.region_size(prompt_len, max_tokens)
        return self.pool.piece_size(size) if isinstance(self.pool, BuddyPool) else size

    def admit(self, seq_id: int, tokens: Sequence[int], max_tokens: int) -> int:
        size = self.region_size(len(tokens), max_tokens)
        region = self.regions[seq_id] = Region(self.pool.allocate(size), size)
        if self.log:
            self.log(RegionPlaced(seq_id, region.start, size))
        return 0

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        for seq_id, count in appends:
            region = self.regions[seq_id]
            if region.length + count > region.size:
                raise ValueError(
                    f"sequence {seq_id} has {region.length} of {region.size} reserved slots in use; "
                    f"{count} more do not fit"
                )
        for seq_id, count in appends:
            self.regions[seq_id].length += count
            if self.log:
                self.log(tokens_appended(seq_id, count))
        return []

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        """Nothing to do: there is no prefix cache."""

    def free(self, seq_id: int) -> None:
        region = self.regions.pop(seq_id)
        self.pool.release(region.start, region.size)
        if self.log:
            self.log(SequenceFreed(seq_id))

    def length(self, seq_id: int) -> int:
        return self.regions[seq_id].length

    def start(self, seq_id: int) -> int:
        """The first slot of the sequence's region."""
        return self.regions[seq_id].start

    def room(self, seq_id: int) -> int:
        region = self.regions[seq_id]
        return region.size - region.length

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        start = self.regions[seq_id].start + first
        return list(range(start, start + count))

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        needed = 0
        if next_request is not None or self.reserve == "max":  # with max, every request needs the same
            needed = self.region_size(*(next_request or (1, 1)))
        pieces = [
            OpenPiece(seq_id, length=region.length, tokens=region.length, slots=region.size)
            for seq_id, region in self.regions.items()
        ]
        external, free = self.pool.split_free(needed)
        if isinstance(self.pool, BuddyPool):  # what rounding up costs
            external += sum(self.pool.piece_size(piece.slots) - piece.slots for piece in pieces)
        return Snapshot(0, pieces, external, free)

    def check_integrity(self) -> None:
        self.pool.check_integrity(self.regions)
