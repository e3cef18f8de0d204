"""What a manager of KV cache memory does. One scheduler, one engine and one model serve all managers through this.

A manager does bookkeeping in Python ints. It never sees K or V: it says which slots a sequence owns and which rows
must be copied first, and kv.py moves what lies in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .block_pool import OutOfBlocks
from .usage import Snapshot


class OutOfHostBlocks(OutOfBlocks):
    """No room in host memory now. The operation that raised it changed nothing."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy `count` rows before this step writes. A row is a block, or a slot where a manager has no blocks.

    Transfers are carried out in the order of their list: each finds what the ones before it left. `copy` and `move`
    stay on the device, `swap_out` goes from device to host, `swap_in` from host to device. The rows of a `move` may
    overlap: all are read before one is written.
    """

    kind: Literal["copy", "move", "swap_out", "swap_in"]
    source: int
    destination: int
    count: int = 1


class KVCacheManager(ABC):
    """Which slots hold which token of which sequence. Lengths and sizes are in tokens, which is in slots.

    A refusal (OutOfBlocks) changes nothing. Sequences can share slots where `can_fork` is true, and go to host memory
    and come back where `can_swap` is true; the methods for it are at the end.
    """

    paged: bool  # True: a sequence lies in blocks; False: in one region
    block_size: int  # slots of a block; 1 where a sequence lies in one region
    num_slots: int  # of the pool
    can_fork = False
    can_swap = False

    @abstractmethod
    def max_slots_needed(self, prompt_len: int, max_len: int, n: int = 1) -> int:
        """Slots that `n` samples of one prompt hold at the worst, each grown to `max_len` tokens."""

    @abstractmethod
    def admit(self, seq_id: int, tokens: Sequence[int], max_len: int, spare: int = 0) -> int:
        """Begin a sequence that soon holds `tokens` and never more than `max_len`; return how many of the leading
        tokens need not be computed, since their K and V are there.

        Raises OutOfBlocks where there is no room now, or where less than `spare` slots would stay free. If no sequence
        holds memory, nothing must stay free.
        """

    @abstractmethod
    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        """Make room for more tokens, given as pairs of sequence and count; return what must be copied first.

        All or none: raises OutOfBlocks where there is no room for all of them now.
        """

    @abstractmethod
    def free(self, seq_id: int) -> None:
        """End the sequence and take back all that it holds."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every sequence, whatever state an interrupted operation left behind: all slots are free."""

    @abstractmethod
    def length(self, seq_id: int) -> int:
        """Tokens of the sequence that have a slot."""

    @abstractmethod
    def placement(self, seq_id: int) -> list[int]:
        """Where the sequence lies: its block table, or the first slot of its region. The caller must not change it."""

    @abstractmethod
    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        """The slots of positions `first` to `first + count - 1`."""

    @abstractmethod
    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        """Where the slots are now. Holes that `next_request` cannot use count as external.

        `next_request` is (tokens, max_len) of the request that is to be admitted next, both as counts.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost, or has two owners that do not share it."""

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:  # noqa: B027 (does nothing here)
        """The K and V of the first `num_written` of the sequence's `tokens` are written now."""

    def fork(self, parent_id: int, child_id: int) -> None:
        """Begin `child_id` with all of the parent's tokens, sharing its slots."""
        raise NotImplementedError(f"{type(self).__name__} cannot share slots")

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        """Take these sequences off the device, all or none. Raises OutOfHostBlocks without room on the host."""
        raise NotImplementedError(f"{type(self).__name__} cannot swap")

    def swap_in(self, seq_ids: Sequence[int], spare: int = 0) -> list[Transfer]:
        """Bring these sequences back, all or none. Raises OutOfBlocks as `admit` does."""
        raise NotImplementedError(f"{type(self).__name__} cannot swap")
