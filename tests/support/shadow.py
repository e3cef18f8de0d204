"""What lies in memory, value by value: the tests' own memory, which follows a manager's transfers.

It knows nothing of reference counts or free lists. If a sequence reads its own values here, then its table
or region points where they were written, and every copy was asked for, in the right order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paged_ref.core.memory.manager import KVCacheManager, Transfer
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.regions import RegionManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.swapping import SwappingManager


class ShadowMemory:
    """One value for each slot, on the device and on the host; None where nothing was written."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.unit = manager.block_size  # slots of a transfer's row
        num_host_slots = 0
        if isinstance(manager, SwappablePagedManager):
            num_host_slots = manager.host_pool.num_blocks * self.unit
        elif isinstance(manager, SwappingManager):
            num_host_slots = manager.host_pool.num_slots
        self.device: list[Any] = [None] * manager.num_slots
        self.host: list[Any] = [None] * num_host_slots

    def follow(self, transfers: Iterable[Transfer]) -> None:
        """Make the transfers, one after another."""
        for transfer in transfers:
            source = self.host if transfer.kind == "swap_in" else self.device
            destination = self.host if transfer.kind == "swap_out" else self.device
            size = transfer.count * self.unit
            first_read, first_written = transfer.source * self.unit, transfer.destination * self.unit
            values = source[first_read : first_read + size]
            assert len(values) == size == len(destination[first_written : first_written + size])
            destination[first_written : first_written + size] = values

    def write(self, seq_id: int, first: int, values: Sequence[Any]) -> None:
        """A step writes positions `first` on of a sequence, where the manager says that they go."""
        for slot, value in zip(self.manager.slots(seq_id, first, len(values)), values, strict=True):
            self.device[slot] = value

    def read(self, seq_id: int, length: int) -> list[Any]:
        """What the sequence finds at its first `length` positions, on the device or on the host."""
        manager, unit = self.manager, self.unit
        if isinstance(manager, PagedManager):
            on_host = isinstance(manager, SwappablePagedManager) and seq_id in manager.swapped
            table = manager.swapped[seq_id] if on_host else manager.tables[seq_id]  # type: ignore[attr-defined]
            memory = self.host if on_host else self.device
            found: list[Any] = []
            for block in table.blocks[: -(-length // unit)]:
                found += memory[block * unit : block * unit + unit]
            return found[:length]
        assert isinstance(manager, RegionManager)
        if isinstance(manager, SwappingManager) and seq_id in manager.swapped:
            start = manager.swapped[seq_id].start
            return self.host[start : start + length]
        start = manager.regions[seq_id].start
        return self.device[start : start + length]
