"""Paged memory management: blocks on demand, a table for each sequence, shared blocks copied on write.

Kwon et al. 2023, §4.2 to §4.4. Everything else in this package exists to be compared with this file, to
feed it, or to show what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kernels.addressing import slot_of
from .block_pool import BlockPool, OutOfBlocks
from .managers import BlockCopy, OpenPiece, Snapshot


@dataclass(slots=True)
class _Table:
    blocks: list[int] = field(default_factory=list)  # logical block -> physical block
    length: int = 0  # tokens that have a slot


class PagedManager:
    """A `KVCacheManager`, and `Forkable`. Invariant: a table has just enough blocks for its length."""

    paged = True

    def __init__(self, num_blocks: int, block_size: int, free_order: Sequence[int] | None = None) -> None:
        """`free_order` fixes the order in which blocks are handed out; see BlockPool."""
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; at least 1 is needed")
        self.pool = BlockPool(num_blocks, free_order)
        self.block_size = block_size
        self.num_slots = num_blocks * block_size
        self.longest = self.num_slots
        self._tables: dict[int, _Table] = {}

    def admit(self, seq_id: int, num_tokens: int, max_tokens: int) -> None:
        needed = self._blocks_for(num_tokens)
        if needed > self.pool.num_free:
            raise OutOfBlocks(f"{num_tokens} tokens need {needed} blocks; {self.pool.num_free} are free")
        self._tables[seq_id] = _Table()

    def append(self, seq_id: int, num_tokens: int) -> list[BlockCopy]:
        table = self._tables[seq_id]
        new_length = table.length + num_tokens
        new_blocks = self._blocks_for(new_length) - len(table.blocks)
        # The write begins in the last block where that has room; whoever shares it must not see the change.
        fills_last = num_tokens > 0 and table.length % self.block_size != 0
        last_is_shared = fills_last and self.pool.ref_count[table.blocks[-1]] > 1
        if new_blocks + last_is_shared > self.pool.num_free:
            raise OutOfBlocks(
                f"sequence {seq_id} needs {new_blocks + last_is_shared} blocks; {self.pool.num_free} are free"
            )
        copies = []
        if last_is_shared:
            copies.append(self._copy_on_write(table))
        table.blocks.extend(self.pool.allocate() for _ in range(new_blocks))
        table.length = new_length
        return copies

    def _copy_on_write(self, table: _Table) -> BlockCopy:
        source = table.blocks[-1]
        table.blocks[-1] = self.pool.allocate()
        self.pool.release(source)
        return BlockCopy(source, table.blocks[-1])

    def fork(self, parent_id: int, child_id: int) -> None:
        parent = self._tables[parent_id]
        for block_id in parent.blocks:
            self.pool.share(block_id)
        self._tables[child_id] = _Table(parent.blocks.copy(), parent.length)

    def free(self, seq_id: int) -> None:
        # The last block first, so that the first one is the next to be handed out again.
        for block_id in reversed(self._tables.pop(seq_id).blocks):
            self.pool.release(block_id)

    def length(self, seq_id: int) -> int:
        return self._tables[seq_id].length

    def block_table(self, seq_id: int) -> list[int]:
        """The physical blocks of the sequence, in order. The caller must not change the list."""
        return self._tables[seq_id].blocks

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        blocks = self._tables[seq_id].blocks
        return [slot_of(blocks, position, self.block_size) for position in range(first, first + count)]

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        # Only the last block of a table can have empty slots; sequences that share one count it once.
        pieces: dict[int, OpenPiece] = {}
        entries = 0
        for seq_id, table in self._tables.items():
            entries += len(table.blocks)
            filled = table.length % self.block_size
            if filled:
                pieces[table.blocks[-1]] = OpenPiece(seq_id, table.length, filled, self.block_size)
        held = self.pool.num_blocks - self.pool.num_free
        return Snapshot(
            full=(held - len(pieces)) * self.block_size,
            open=list(pieces.values()),
            external=0,  # any free block serves any request
            free=self.pool.num_free * self.block_size,
            shared=(entries - held) * self.block_size,
        )

    def check_integrity(self) -> None:
        for seq_id, table in self._tables.items():
            if len(table.blocks) != self._blocks_for(table.length):
                raise AssertionError(
                    f"sequence {seq_id}: {len(table.blocks)} blocks for {table.length} tokens"
                )
        self.pool.check_integrity(block for table in self._tables.values() for block in table.blocks)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
