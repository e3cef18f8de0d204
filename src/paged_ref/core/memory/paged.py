"""Paged memory management: blocks on demand, a table for each sequence, shared blocks copied on write.

Kwon et al. 2023, §4.2 to §4.4. Everything else in this package exists to be compared with this file, to feed it, or
to show what it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..attention.addressing import slot_of
from ..checks import plural, require
from .block_pool import BlockPool, OutOfBlocks
from .manager import KVCacheManager, Transfer
from .usage import PartialAllocation, Snapshot


@dataclass(slots=True)
class Table:
    """The block table of one sequence."""

    blocks: list[int] = field(default_factory=list)  # logical block -> physical block
    length: int = 0  # tokens that have a slot
    open_until: int = 0  # up to this length, tokens go into the last block, which is this table's alone; 0: not known


class PagedManager(KVCacheManager):
    """A table of blocks for each sequence. Invariant: a table has just enough blocks for its tokens."""

    paged = True
    can_fork = True

    def __init__(self, pool: BlockPool, block_size: int, watermark: int = 0) -> None:
        """Admission leaves `watermark` blocks, so that running sequences can grow before one must be preempted."""
        require(num_blocks=(pool.num_blocks, 1), block_size=(block_size, 1), watermark=(watermark, 0))
        self.pool = pool
        self.block_size = block_size
        self.num_slots = pool.num_blocks * block_size
        self.watermark = watermark
        self.tables: dict[int, Table] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def max_slots_needed(self, prompt_len: int, max_len: int, n: int = 1) -> int:
        shared = prompt_len // self.block_size if n > 1 else 0  # full blocks of the prompt
        return (shared + n * (self.blocks_for(max_len) - shared)) * self.block_size

    # --- a sequence's life ---------------------------------------------------------------------------

    def admit(self, seq_id: int, tokens: Sequence[int], max_len: int, spare: int = 0) -> int:
        # The last token is always computed: its logits choose the next token.
        known = self.pool.lookup(tokens[: len(tokens) - 1], self.block_size)
        revived = sum(1 for block_id in known if not self.pool.ref_count[block_id])
        self.require_room(self.blocks_for(len(tokens)) - len(known), self.pool.num_free - revived, spare)
        for block_id in known:
            self.pool.share(block_id)
        table = self.tables[seq_id] = Table(known, len(known) * self.block_size)
        return table.length

    def require_room(self, needed: int, available: int, spare: int) -> None:
        """Raise OutOfBlocks unless `available` blocks are enough for an admission that needs `needed` and leaves
        `spare` slots."""
        kept = max(self.watermark, self.blocks_for(spare))
        if self.pool.num_free == self.pool.num_blocks:  # no sequence holds a block: admission may take every block
            kept = 0
        if needed + kept > available:
            raise OutOfBlocks(f"no room for {plural(needed, 'block')}: {available} available, {kept} of these spare")

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        # Most tokens go into an open block. The other tables need a block, or their last block may be shared or cached.
        asking = []
        for seq_id, count in appends:
            table = self.tables[seq_id]
            if count and table.length + count > table.open_until:
                asking.append((table, count))
        needed = self._blocks_needed(asking)
        if needed > self.pool.num_free:
            ids = ", ".join(str(seq_id) for seq_id, _ in appends)
            raise OutOfBlocks(f"no room for {plural(needed, 'block')} (seq_id {ids}): {self.pool.num_free} available")
        transfers = []
        for table, count in asking:
            if self.writes_shared_block(table, count):
                transfers.append(self._copy_on_write(table))
            elif table.length % self.block_size:
                self.pool.reopened(table.blocks[-1])
            while len(table.blocks) * self.block_size < table.length + count:
                table.blocks.append(self.pool.allocate())
            table.open_until = len(table.blocks) * self.block_size
        for seq_id, count in appends:
            self.tables[seq_id].length += count
        return transfers

    def _blocks_needed(self, appends: Sequence[tuple[Table, int]]) -> int:
        """New blocks and copies on write, if the appends are made one after another."""
        needed = 0
        copies: dict[int, int] = {}  # shared block -> tables that have left it by then
        for table, count in appends:
            needed += self.blocks_for(table.length + count) - len(table.blocks)
            if self.writes_shared_block(table, count):
                block_id = table.blocks[-1]
                left = copies.get(block_id, 0)
                if self.pool.ref_count[block_id] - left > 1:  # else this table is the last one, and writes in place
                    copies[block_id] = left + 1
                    needed += 1
        return needed

    def writes_shared_block(self, table: Table, count: int) -> bool:
        """The next token goes into a partly filled block that another table points to as well."""
        return bool(table.length % self.block_size and count) and self.pool.ref_count[table.blocks[-1]] > 1

    def _copy_on_write(self, table: Table) -> Transfer:
        """Put a block of its own in the place of the table's last, shared one."""
        source = table.blocks[-1]
        table.blocks[-1] = self.pool.allocate()
        self.pool.release(source)
        return Transfer("copy", source, table.blocks[-1])

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        self.pool.filled(self.tables[seq_id].blocks, num_written // self.block_size, tokens, self.block_size)

    def fork(self, parent_id: int, child_id: int) -> None:
        parent = self.tables[parent_id]
        for block_id in parent.blocks:
            self.pool.share(block_id)
        parent.open_until = 0  # its last block is shared now
        self.tables[child_id] = Table(parent.blocks.copy(), parent.length)

    def truncate(self, seq_id: int, length: int) -> None:
        table = self.tables[seq_id]
        if not 0 <= length <= table.length:
            raise ValueError(f"length is {length}; that of sequence {seq_id} is {table.length}")
        table.length, table.open_until = length, 0  # the pool may know the last block with other tokens
        while len(table.blocks) > self.blocks_for(length):
            self.pool.release(table.blocks.pop())

    def free(self, seq_id: int) -> None:
        # The last block first, so that the first block is the next one to be handed out.
        for block_id in reversed(self.tables.pop(seq_id).blocks):
            self.pool.release(block_id)

    def clear(self) -> None:
        self.tables.clear()
        self.pool.clear()

    # --- looking -------------------------------------------------------------------------------------

    def length(self, seq_id: int) -> int:
        return self.tables[seq_id].length

    def placement(self, seq_id: int) -> list[int]:
        return self.tables[seq_id].blocks

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        blocks = self.tables[seq_id].blocks
        return [slot_of(blocks, position, self.block_size) for position in range(first, first + count)]

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        held, free = self.pool.num_blocks - self.pool.num_free, self.pool.num_free - self.pool.num_cached
        return snapshot_of(self.tables, self.block_size, held, free, self.pool.num_cached)

    def check_integrity(self) -> None:
        for seq_id, table in self.tables.items():
            if len(table.blocks) != self.blocks_for(table.length):
                raise AssertionError(f"sequence {seq_id}, length {table.length}: {plural(len(table.blocks), 'block')}")
            if table.length < table.open_until and self.pool.ref_count[table.blocks[-1]] > 1:
                raise AssertionError(f"sequence {seq_id} would write into block {table.blocks[-1]}, which is shared")
        self.pool.check_integrity(block_id for table in self.tables.values() for block_id in table.blocks)


def snapshot_of(tables: Mapping[int, Table], block_size: int, held: int, free: int, cached: int) -> Snapshot:
    """Where the slots of a pool are, from its blocks in tables, free blocks and cached blocks."""
    partial: dict[int, PartialAllocation] = {}  # by block: sequences that share a block count it once
    for seq_id, table in tables.items():
        if filled := table.length % block_size:
            partial[table.blocks[-1]] = PartialAllocation(seq_id, table.length, filled, block_size)
    return Snapshot(
        full=(held - len(partial)) * block_size,
        partial=list(partial.values()),
        external=0,  # any free block serves any request
        free=free * block_size,
        cached=cached * block_size,
        shared=(sum(len(table.blocks) for table in tables.values()) - held) * block_size,
    )
