"""Preemption by swapping: a paged manager whose sequences can wait in host memory (Kwon et al. 2023, §4.5)."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.checks import plural
from ..core.memory.block_pool import BlockPool, OutOfBlocks
from ..core.memory.manager import OutOfHostBlocks, Transfer
from ..core.memory.paged import PagedManager, Table


class SwappablePagedManager(PagedManager):
    """The tables of swapped sequences, whose blocks are host blocks, are kept apart from those on the device."""

    can_swap = True

    def __init__(self, pool: BlockPool, block_size: int, num_host_blocks: int, watermark: int = 0) -> None:
        super().__init__(pool, block_size, watermark)
        self.host_pool = BlockPool(num_host_blocks)
        self.swapped: dict[int, Table] = {}

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        needed = len({block_id for seq_id in seq_ids for block_id in self.tables[seq_id].blocks})
        if needed > self.host_pool.num_free:
            raise OutOfHostBlocks(f"no room for {plural(needed, 'block')} on the host: {self.host_pool.num_free} free")
        moved = _move_tables(seq_ids, self.tables, self.pool, self.swapped, self.host_pool)
        return [Transfer("swap_out", source, destination) for source, destination in moved.items()]

    def swap_in(self, seq_ids: Sequence[int], spare: int = 0) -> list[Transfer]:
        needed = len({block_id for seq_id in seq_ids for block_id in self.swapped[seq_id].blocks})
        try:
            self.require_room(needed, self.pool.num_free, spare)
        except OutOfBlocks as error:
            raise OutOfBlocks(f"to swap in, {error}") from None
        moved = _move_tables(seq_ids, self.swapped, self.host_pool, self.tables, self.pool)
        return [Transfer("swap_in", source, destination) for source, destination in moved.items()]

    def free(self, seq_id: int) -> None:
        if seq_id in self.tables:
            super().free(seq_id)
        else:
            for block_id in reversed(self.swapped.pop(seq_id).blocks):
                self.host_pool.release(block_id)

    def clear(self) -> None:
        super().clear()
        self.swapped.clear()
        self.host_pool.clear()

    def length(self, seq_id: int) -> int:
        return (self.tables.get(seq_id) or self.swapped[seq_id]).length

    def check_integrity(self) -> None:
        super().check_integrity()
        self.host_pool.check_integrity(block_id for table in self.swapped.values() for block_id in table.blocks)


def _move_tables(
    seq_ids: Sequence[int], source: dict[int, Table], old_pool: BlockPool, target: dict[int, Table], new_pool: BlockPool
) -> dict[int, int]:
    """Move tables from one pool to the other; return old block -> new block.

    A block that several of the sequences share travels once, and they share it there.
    """
    new_block: dict[int, int] = {}
    for seq_id in seq_ids:
        for block_id in source[seq_id].blocks:
            if block_id in new_block:
                new_pool.share(new_block[block_id])
            else:
                new_block[block_id] = new_pool.allocate()
    for seq_id in seq_ids:
        table = source.pop(seq_id)
        for block_id in reversed(table.blocks):
            old_pool.release(block_id)
        target[seq_id] = Table([new_block[block_id] for block_id in table.blocks], table.length)
    return new_block
