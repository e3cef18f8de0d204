"""Standard memory management: one contiguous region for each sequence, reserved for its whole life.

What serving systems did before paging. How much is reserved is a choice, and the paper measures three: `max` (the
longest sequence that the model allows), `pow2` (the prompt, and the output rounded up to a power of two) and `exact`
(an oracle that knows the output's length). Kwon et al. 2023, §6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..checks import plural, require, require_one_of
from .manager import Transfer
from .regions import Region, RegionManager, RegionPool
from .usage import Snapshot

Reserve = Literal["max", "pow2", "exact"]


class StandardManager(RegionManager):
    """Reserves a region for each sequence, and never moves anything."""

    def __init__(
        self, num_slots: int, max_model_len: int, reserve: Reserve = "max", pool: RegionPool | None = None
    ) -> None:
        """`max_model_len` is the longest sequence; `max` reserves that many slots for each. `pool` places the
        regions (default: first fit)."""
        require_one_of(("max", "pow2", "exact"), reserve=reserve)
        require(max_model_len=(max_model_len, 1))
        if reserve == "max" and num_slots < max_model_len:
            raise ValueError(
                f"the standard manager reserves max_model_len = {max_model_len} slots for each sequence; "
                f"the KV cache has {num_slots}"
            )
        super().__init__(RegionPool(num_slots) if pool is None else pool)
        self.reserve = reserve
        self.max_model_len = max_model_len

    def region_size(self, num_tokens: int, max_len: int) -> int:
        """Slots to reserve for a prompt of `num_tokens` that grows to at most `max_len`."""
        if self.reserve == "max":
            return max(self.max_model_len, max_len)
        if self.reserve == "exact":
            return max_len
        output = max(1, max_len - num_tokens)
        return min(num_tokens + (1 << (output - 1).bit_length()), max(self.max_model_len, max_len))

    def max_slots_needed(self, prompt_len: int, max_len: int, n: int = 1) -> int:
        # One region is enough for all n: samples are sequences of their own here, and can take turns.
        return self.pool.slots_taken(self.region_size(prompt_len, max_len))

    def admit(self, seq_id: int, tokens: Sequence[int], max_len: int, spare: int = 0) -> int:
        size = self.region_size(len(tokens), max_len)
        self.regions[seq_id] = Region(self.pool.allocate(size), size)
        return 0

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        for seq_id, count in appends:
            region = self.regions[seq_id]
            if region.length + count > region.size:
                raise ValueError(
                    f"sequence {seq_id} has {region.length} of {plural(region.size, 'reserved slot')} in use; "
                    f"no room for {count} more"
                )
        for seq_id, count in appends:
            self.regions[seq_id].length += count
        return []

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        needed = 0
        if next_request is not None or self.reserve == "max":  # with max, every request needs the same
            needed = self.region_size(*(next_request or (1, 1)))
        partial = self.partial_allocations()
        external, free = self.pool.split_free(needed)
        external += sum(self.pool.slots_taken(piece.slots) - piece.slots for piece in partial)
        return Snapshot(0, partial, external, free)
