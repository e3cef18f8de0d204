"""What every KV cache manager can do, so that one scheduler and one model serve them all.

A manager does bookkeeping in Python ints. It never sees K or V: it says which slots a sequence owns and
which rows must be copied first, and storage.py moves what lies in them. What only some managers can do is
a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from .block_pool import OutOfBlocks

__all__ = [
    "BlockTables",
    "Contiguous",
    "Forkable",
    "KVCacheManager",
    "KnowsRoom",
    "MemoryUsage",
    "OpenPiece",
    "OutOfBlocks",
    "OutOfHostBlocks",
    "Snapshot",
    "Swappable",
    "Transfer",
]


class OutOfHostBlocks(OutOfBlocks):
    """No room in host memory now. Whoever raised it changed nothing."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy `count` rows before this step writes. A row is a block, or a slot where a manager has no blocks.

    Transfers are made in the order of their list: each finds what the ones before it left. `copy` and
    `move` stay on the device, `swap_out` goes from device to host, `swap_in` from host to device. The rows
    of a `move` may overlap: all are read before one is written.
    """

    kind: Literal["copy", "move", "swap_out", "swap_in"]
    source: int
    destination: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Where the slots of the pool are. The first six sum to the pool; the paper's Fig. 2 has such parts."""

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
    cached: int = 0
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
        return MemoryUsage(tokens, reserved, internal, self.external, self.cached, self.free, self.shared)


@runtime_checkable
class KVCacheManager(Protocol):
    """Bookkeeping of which slots hold which token. Lengths and sizes are in tokens, which is slots."""

    paged: bool  # True: BlockTables; False: Contiguous
    num_slots: int  # the pool

    def most_slots(self, prompt_len: int, max_tokens: int, n: int = 1) -> int:
        """Slots that `n` samples of one prompt hold at the worst, each grown to `max_tokens`."""

    def admit(self, seq_id: int, tokens: Sequence[int], max_tokens: int) -> int:
        """Begin a sequence that soon holds `tokens` and never more than `max_tokens`.

        Returns how many of the leading tokens need not be computed, since their K and V are there. Raises
        OutOfBlocks, and changes nothing, when there is no room now.
        """

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        """Make room for more tokens: pairs of sequence and count. Returns what must be copied first.

        All or none: raises OutOfBlocks, and changes nothing, when there is no room for all of them now.
        """

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        """The K and V of the first `num_written` of the sequence's `tokens` are written now."""

    def free(self, seq_id: int) -> None:
        """End the sequence and give back all that it holds."""

    def length(self, seq_id: int) -> int:
        """Tokens of the sequence that have a slot."""

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        """The slots of positions `first` to `first + count - 1`."""

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        """Where the slots are now. Holes that `next_request` cannot use count as external.

        `next_request` is (tokens, max_tokens) of whoever is to be admitted next, both as counts.
        """

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost, or has two owners that do not share it."""


@runtime_checkable
class BlockTables(Protocol):
    """A manager that places a sequence in blocks."""

    def block_table(self, seq_id: int) -> list[int]:
        """The physical blocks of the sequence, in order. The caller must not change the list."""


@runtime_checkable
class Contiguous(Protocol):
    """A manager that places a sequence in one region."""

    def start(self, seq_id: int) -> int:
        """The first slot of the sequence's region."""


@runtime_checkable
class KnowsRoom(Protocol):
    """A manager that can be told later of tokens that need no room, and of several sequences at once."""

    def room(self, seq_id: int) -> int:
        """How many more tokens fit in what the sequence holds: with these, `append` asks for nothing."""


@runtime_checkable
class Forkable(Protocol):
    """A manager whose sequences can share slots."""

    def fork(self, parent_id: int, child_id: int) -> None:
        """Begin `child_id` with all of the parent's tokens. Copies nothing."""


@runtime_checkable
class Swappable(Protocol):
    """A manager that can keep sequences in host memory for a while."""

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        """Take these sequences off the device. Raises OutOfHostBlocks, and changes nothing, without room."""

    def swap_in(self, seq_ids: Sequence[int]) -> list[Transfer]:
        """Bring them back. Raises OutOfBlocks, and changes nothing, when there is no room now."""
