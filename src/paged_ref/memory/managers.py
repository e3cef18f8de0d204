"""What every KV cache manager can do, so that one scheduler and one model serve them all.

A manager does bookkeeping in Python ints. It never sees K or V: it says which slots a sequence owns, and
storage.py moves what lies in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from .block_pool import OutOfBlocks

__all__ = ["BlockCopy", "Forkable", "KVCacheManager", "MemoryUsage", "OpenPiece", "OutOfBlocks", "Snapshot"]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy all slots of block `source` to block `destination` before this step writes."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Where the slots of the pool are. The first five sum to the pool; the paper's Fig. 2 has these parts."""

    tokens: int  # hold K and V of a token
    reserved: int  # empty now, and their sequence will come to use them
    internal: int  # inside a region or block, and never to be used by its sequence
    external: int  # free, in holes too small for the next request
    free: int  # free, and usable
    shared: int = 0  # slots that sharing saves: what separate copies would need on top

    @property
    def total(self) -> int:
        return self.tokens + self.reserved + self.internal + self.external + self.free


class OpenPiece(NamedTuple):
    """A region or block that still has empty slots, and the sequence that will fill them."""

    seq_id: int
    length: int  # tokens of the sequence
    tokens: int  # of these, in this piece
    slots: int  # of this piece


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a manager holds at one moment, before anyone knows how long each sequence will get."""

    full: int  # slots in pieces without an empty slot
    open: list[OpenPiece]
    external: int
    free: int
    shared: int = 0

    def usage(self, final_lengths: Mapping[int, int]) -> MemoryUsage:
        """The parts, once `final_lengths` (sequence to the most slots it came to hold) are known.

        A sequence that is not named there is taken to be at its end.
        """
        tokens, reserved, internal = self.full, 0, 0
        for piece in self.open:
            empty = piece.slots - piece.tokens
            to_come = min(empty, max(0, final_lengths.get(piece.seq_id, 0) - piece.length))
            tokens += piece.tokens
            reserved += to_come
            internal += empty - to_come
        return MemoryUsage(tokens, reserved, internal, self.external, self.free, self.shared)


@runtime_checkable
class KVCacheManager(Protocol):
    """Bookkeeping of which slots hold which token. Lengths and sizes are in tokens, which is slots."""

    paged: bool  # True: block_table() places a sequence; False: one region from start()
    num_slots: int  # the pool
    longest: int  # the most tokens that one sequence can ever hold, alone

    def admit(self, seq_id: int, num_tokens: int, max_tokens: int) -> None:
        """Begin a sequence of length 0 that holds `num_tokens` soon and never more than `max_tokens`.

        Raises OutOfBlocks, and changes nothing, when there is no room now.
        """

    def append(self, seq_id: int, num_tokens: int) -> list[BlockCopy]:
        """Make room for `num_tokens` more tokens; return the block copies that must come before the write.

        Raises OutOfBlocks, and changes nothing, when there is no room now.
        """

    def free(self, seq_id: int) -> None:
        """End the sequence and give back all that it holds."""

    def length(self, seq_id: int) -> int:
        """Tokens of the sequence that have a slot."""

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        """The slots of positions `first` to `first + count - 1`."""

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        """Where the slots are now. Holes that `next_request` cannot use count as external.

        `next_request` is (num_tokens, max_tokens) of whoever is to be admitted next, as in admit().
        """

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost, or has two owners that do not share it."""


@runtime_checkable
class Forkable(Protocol):
    """A manager whose sequences can share slots."""

    def fork(self, parent_id: int, child_id: int) -> None:
        """Begin `child_id` with all of the parent's tokens. Copies nothing."""
