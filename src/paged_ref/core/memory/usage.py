"""Where the slots of a pool are at one moment: the parts that the paper's Fig. 2 compares (Kwon et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Slots by what they are for. The first six parts sum to the pool."""

    tokens: int  # hold K and V of a token that a sequence uses
    reserved: int  # empty now, and their sequence will come to use them
    internal: int  # inside a region or block, and never to be used by its sequence
    external: int  # free, in holes too small for the next request
    cached: int  # hold K and V that no sequence uses now; given up when the room is needed
    free: int  # free, and usable
    shared: int = 0  # slots that sharing saves: what separate copies would need on top

    @property
    def total(self) -> int:
        return self.tokens + self.reserved + self.internal + self.external + self.cached + self.free


class PartialAllocation(NamedTuple):
    """A region or block that still has empty slots, and the sequence that will fill them."""

    seq_id: int
    length: int  # tokens of the sequence
    tokens: int  # of these, in this region or block
    slots: int  # of this region or block


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a manager holds at one moment, before the final length of each sequence is known."""

    full: int  # slots in regions and blocks without an empty slot
    partial: list[PartialAllocation]
    external: int
    free: int
    cached: int = 0
    shared: int = 0

    def usage(self, final_lengths: Mapping[int, int]) -> MemoryUsage:
        """The parts, once `final_lengths` (sequence to the most slots that it came to hold) are known.

        A sequence that is not named there is taken to be at its end.
        """
        tokens, reserved, internal = self.full, 0, 0
        for allocation in self.partial:
            empty = allocation.slots - allocation.tokens
            to_come = min(empty, max(0, final_lengths.get(allocation.seq_id, 0) - allocation.length))
            tokens += allocation.tokens
            reserved += to_come
            internal += empty - to_come
        return MemoryUsage(tokens, reserved, internal, self.external, self.cached, self.free, self.shared)
