"""Standard memory management: one contiguous region for each sequence, reserved for its whole life.

What serving systems did before paging. How much is reserved is a choice, and the paper measures three:
`max` (the longest sequence that the model allows), `pow2` (the prompt and the output rounded up to a power
of two) and `exact` (an oracle that knows the output's length). Kwon et al. 2023, §6.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .managers import BlockCopy, OpenPiece, Snapshot
from .regions import RegionPool

Reserve = Literal["max", "pow2", "exact"]


@dataclass(slots=True)
class Region:
    start: int
    size: int  # slots reserved
    length: int = 0  # slots that hold a token


class StandardManager:
    """A `KVCacheManager` that reserves first fit and never moves anything."""

    paged = False

    def __init__(self, num_slots: int, max_model_len: int, reserve: Reserve = "max") -> None:
        """`max_model_len` is the longest sequence; `max` reserves that many slots for each."""
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
        self.longest = min(num_slots, max_model_len)
        self.reserve = reserve
        self.max_model_len = max_model_len
        self._pool = RegionPool(num_slots)
        self._regions: dict[int, Region] = {}

    def region_size(self, num_tokens: int, max_tokens: int) -> int:
        """Slots to reserve for a prompt of `num_tokens` that grows to at most `max_tokens`."""
        if self.reserve == "max":
            return self.max_model_len
        if self.reserve == "exact":
            return max_tokens
        output = max(1, max_tokens - num_tokens)
        return min(num_tokens + (1 << (output - 1).bit_length()), self.longest)

    def admit(self, seq_id: int, num_tokens: int, max_tokens: int) -> None:
        size = self.region_size(num_tokens, max_tokens)
        self._regions[seq_id] = Region(self._pool.allocate(size), size)

    def append(self, seq_id: int, num_tokens: int) -> list[BlockCopy]:
        region = self._regions[seq_id]
        if region.length + num_tokens > region.size:
            raise ValueError(
                f"sequence {seq_id} has {region.length} of {region.size} reserved slots in use; "
                f"{num_tokens} more do not fit"
            )
        region.length += num_tokens
        return []

    def free(self, seq_id: int) -> None:
        region = self._regions.pop(seq_id)
        self._pool.release(region.start, region.size)

    def length(self, seq_id: int) -> int:
        return self._regions[seq_id].length

    def start(self, seq_id: int) -> int:
        """The first slot of the sequence's region."""
        return self._regions[seq_id].start

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        start = self._regions[seq_id].start + first
        return list(range(start, start + count))

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        needed = 0
        if next_request is not None or self.reserve == "max":  # with max, every request needs the same
            needed = self.region_size(*(next_request or (1, 1)))
        sizes = [size for _, size in self._pool.holes]
        external = sum(size for size in sizes if size < needed)
        pieces = [
            OpenPiece(seq_id, length=region.length, tokens=region.length, slots=region.size)
            for seq_id, region in self._regions.items()
        ]
        return Snapshot(0, pieces, external, sum(sizes) - external)

    def check_integrity(self) -> None:
        for seq_id, region in self._regions.items():
            if region.length > region.size:
                raise AssertionError(f"sequence {seq_id} has {region.length} tokens in {region.size} slots")
        self._pool.check_integrity([(region.start, region.size) for region in self._regions.values()])
