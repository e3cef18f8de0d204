"""Paged memory management: blocks on demand, a table for each sequence, shared blocks copied on write.

Kwon et al. 2023, §4.2 to §4.5. Everything else in this package exists to be compared with this file, to
feed it, or to show what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...extras.prefix_cache import PrefixCache, block_digests
from ...timeline.events import (
    BlockCached,
    Log,
    PoolOpened,
    SequenceAdmitted,
    SequenceForked,
    SequenceFreed,
    SwappedIn,
    SwappedOut,
    TokensAppended,
    tokens_appended,
)
from ..attention.addressing import slot_of
from .block_pool import BlockPool, OutOfBlocks
from .manager import OpenPiece, OutOfHostBlocks, Snapshot, Transfer


@dataclass(slots=True)
class Table:
    """The block table of one sequence."""

    blocks: list[int] = field(default_factory=list)  # logical block -> physical block
    length: int = 0  # tokens that have a slot
    on_host: bool = False  # the blocks are host blocks: swapped out
    num_digested: int = 0  # leading blocks that the prefix cache was told of
    digest: bytes = b""  # of the last of these


class PagedManager:
    """A `KVCacheManager`, `Forkable` and `Swappable`. Invariant: a table has just enough blocks."""

    paged = True

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        free_order: Sequence[int] | None = None,
        num_host_blocks: int = 0,
        watermark: int = 0,
        prefix_cache: bool = False,
        log: Log | None = None,
    ) -> None:
        """`free_order` fixes the order in which blocks are handed out (BlockPool). Admission leaves
        `watermark` blocks available, so that whoever runs can grow a little before someone is preempted."""
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("num_host_blocks", num_host_blocks, 0),
            ("watermark", watermark, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; at least {least} is needed")
        self.pool = BlockPool(num_blocks, free_order)
        self.host_pool = BlockPool(num_host_blocks)
        self.block_size = block_size
        self.num_slots = num_blocks * block_size
        self.watermark = watermark
        self.cache = PrefixCache() if prefix_cache else None
        self.tables: dict[int, Table] = {}
        self.log = log
        self._evicted: list[int] = []  # by the operation under way; told in its event
        if log:
            order = tuple(self.pool.free_blocks)
            log(PoolOpened("paged", num_blocks, block_size, num_host_blocks, order))

    # --- room --------------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def most_slots(self, prompt_len: int, max_tokens: int, n: int = 1) -> int:
        shared = prompt_len // self.block_size if n > 1 else 0  # full blocks of the prompt
        return (shared + n * (self.blocks_for(max_tokens) - shared)) * self.block_size

    @property
    def num_available(self) -> int:
        """Blocks that can be had at once: free, or idle in the prefix cache."""
        return self.pool.num_free + (len(self.cache.idle) if self.cache else 0)

    @property
    def _spare(self) -> int:
        """Blocks that admission leaves for those that run. Whoever has the device alone may take all."""
        return self.watermark if self.num_available < self.pool.num_blocks else 0

    def _allocate(self) -> int:
        if not self.pool.num_free and self.cache and self.cache.idle:
            block_id = self.cache.evict()
            self.pool.free_idle(block_id)
            self._evicted.append(block_id)
        return self.pool.allocate()

    def _release(self, block_id: int) -> None:
        known = self.cache is not None and self.cache.knows(block_id)
        if self.pool.release(block_id, keep_idle=known) and known and self.cache:
            self.cache.now_idle(block_id)

    def _take_evicted(self) -> tuple[int, ...]:
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    # --- KVCacheManager ----------------------------------------------------------------------------

    def admit(self, seq_id: int, tokens: Sequence[int], max_tokens: int) -> int:
        known: list[int] = []
        digest = b""
        if self.cache:
            # At least the last token must be computed, to say what comes next: a prompt that is known to
            # its end gives up its last block.
            digests = list(block_digests(tokens, self.block_size))[: (len(tokens) - 1) // self.block_size]
            known = self.cache.match(digests)
            digest = digests[len(known) - 1] if known else b""
        idle = sum(1 for block_id in known if not self.pool.ref_count[block_id])
        needed = self.blocks_for(len(tokens)) - len(known)
        spare = self._spare
        if needed + spare > self.num_available - idle:
            raise OutOfBlocks(
                f"{len(tokens)} tokens need {needed} blocks; {self.num_available - idle} can be had, "
                f"and {spare} are kept for those that run"
            )
        for block_id in known:
            self.pool.share(block_id)
            if self.cache:
                self.cache.now_used(block_id)
        table = Table(known, len(known) * self.block_size, num_digested=len(known), digest=digest)
        self.tables[seq_id] = table
        if self.log:
            self.log(SequenceAdmitted(seq_id, tuple(known), table.length))
        return table.length

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        needed = self._blocks_needed(appends)
        if not needed:  # most decode steps: there is room in the last block, and nobody to share it with
            for seq_id, count in appends:
                self.tables[seq_id].length += count
                if self.log:
                    self.log(tokens_appended(seq_id, count))
            return []
        if needed > self.num_available:
            ids = ", ".join(str(seq_id) for seq_id, _ in appends)
            raise OutOfBlocks(f"sequences {ids} need {needed} blocks; {self.num_available} can be had")
        transfers = []
        for seq_id, count in appends:
            table = self.tables[seq_id]
            copied: tuple[int, ...] = ()
            if self._writes_shared_block(table, count):
                copied = self._copy_on_write(table)
                transfers.append(Transfer("copy", *copied))
            first_new = len(table.blocks)
            table.length += count
            while len(table.blocks) < self.blocks_for(table.length):
                table.blocks.append(self._allocate())
            if self.log:
                new_blocks = tuple(table.blocks[first_new:])
                self.log(TokensAppended(seq_id, count, new_blocks, copied, self._take_evicted()))
        return transfers

    def _blocks_needed(self, appends: Sequence[tuple[int, int]]) -> int:
        """New blocks and copies on write, when the appends are made one after another."""
        needed = 0
        copies_before: dict[int, int] = {}  # shared block -> tables that have left it by then
        for seq_id, count in appends:
            table = self.tables[seq_id]
            missing = table.length + count - len(table.blocks) * self.block_size
            if missing > 0:
                needed += self.blocks_for(missing)
            if self._writes_shared_block(table, count):
                block_id = table.blocks[-1]
                left = copies_before.get(block_id, 0)
                if self.pool.ref_count[block_id] - left > 1:  # else it is the last one, and writes in place
                    copies_before[block_id] = left + 1
                    needed += 1
        return needed

    def _writes_shared_block(self, table: Table, count: int) -> bool:
        """The next write begins in a last block that has room, and someone shares it."""
        if count == 0 or table.length % self.block_size == 0:
            return False
        return self.pool.ref_count[table.blocks[-1]] > 1

    def _copy_on_write(self, table: Table) -> tuple[int, int]:
        source = table.blocks[-1]
        table.blocks[-1] = self._allocate()
        self._release(source)
        return source, table.blocks[-1]

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        if self.cache is None:
            return
        table = self.tables[seq_id]
        full = num_written // self.block_size
        if table.num_digested >= full:
            return
        new_tokens = tokens[table.num_digested * self.block_size : full * self.block_size]
        for digest in block_digests(new_tokens, self.block_size, table.digest):
            block_id = table.blocks[table.num_digested]
            table.num_digested += 1
            table.digest = digest
            # The first block with this content wins; a second one, computed in the same step, stays private.
            if self.cache.insert(digest, block_id) and self.log:
                self.log(BlockCached(block_id, digest.hex()))

    def free(self, seq_id: int) -> None:
        table = self.tables.pop(seq_id)
        # The last block first: the first is then handed out again first, and leaves the prefix cache last.
        for block_id in reversed(table.blocks):
            if table.on_host:
                self.host_pool.release(block_id)
            else:
                self._release(block_id)
        if self.log:
            self.log(SequenceFreed(seq_id))

    def length(self, seq_id: int) -> int:
        return self.tables[seq_id].length

    def room(self, seq_id: int) -> int:
        table = self.tables[seq_id]
        if self._writes_shared_block(table, 1):
            return 0
        return len(table.blocks) * self.block_size - table.length

    def block_table(self, seq_id: int) -> list[int]:
        """The physical blocks of the sequence, in order. The caller must not change the list."""
        return self.tables[seq_id].blocks

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        blocks = self.tables[seq_id].blocks
        return [slot_of(blocks, position, self.block_size) for position in range(first, first + count)]

    # --- Forkable ----------------------------------------------------------------------------------

    def fork(self, parent_id: int, child_id: int) -> None:
        parent = self.tables[parent_id]
        for block_id in parent.blocks:
            self.pool.share(block_id)
        self.tables[child_id] = Table(
            parent.blocks.copy(), parent.length, num_digested=parent.num_digested, digest=parent.digest
        )
        if self.log:
            self.log(SequenceForked(parent_id, child_id))

    # --- Swappable ---------------------------------------------------------------------------------

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        num_blocks = len({block for seq_id in seq_ids for block in self.tables[seq_id].blocks})
        if num_blocks > self.host_pool.num_free:
            raise OutOfHostBlocks(f"{num_blocks} blocks to swap out; {self.host_pool.num_free} host blocks are free")
        host_of = self._rehouse(seq_ids, self.host_pool.allocate, self.host_pool.share, self._release)
        for seq_id in seq_ids:
            self.tables[seq_id].on_host = True
        if self.log:
            self.log(SwappedOut(tuple(seq_ids), tuple(host_of.items())))
        return [Transfer("swap_out", source, destination) for source, destination in host_of.items()]

    def swap_in(self, seq_ids: Sequence[int]) -> list[Transfer]:
        num_blocks = len({block for seq_id in seq_ids for block in self.tables[seq_id].blocks})
        spare = self._spare
        if num_blocks + spare > self.num_available:
            raise OutOfBlocks(
                f"{num_blocks} blocks to swap in; {self.num_available} can be had, "
                f"and {spare} are kept for those that run"
            )
        device_of = self._rehouse(seq_ids, self._allocate, self.pool.share, self.host_pool.release)
        for seq_id in seq_ids:
            table = self.tables[seq_id]
            table.on_host = False
            table.num_digested, table.digest = 0, b""  # the prefix cache does not know the new blocks yet
        if self.log:
            self.log(SwappedIn(tuple(seq_ids), tuple(device_of.items()), self._take_evicted()))
        return [Transfer("swap_in", source, destination) for source, destination in device_of.items()]

    def _rehouse(
        self,
        seq_ids: Sequence[int],
        allocate: Callable[[], int],
        share: Callable[[int], None],
        release: Callable[[int], object],
    ) -> dict[int, int]:
        """Move tables from one pool to the other: old block to new block.

        A block that several of the sequences share travels once, and they share it there.
        """
        new_of: dict[int, int] = {}
        for seq_id in seq_ids:
            for block_id in self.tables[seq_id].blocks:
                if block_id in new_of:
                    share(new_of[block_id])
                else:
                    new_of[block_id] = allocate()
        for seq_id in seq_ids:
            table = self.tables[seq_id]
            for block_id in reversed(table.blocks):
                release(block_id)
            table.blocks = [new_of[block_id] for block_id in table.blocks]
        return new_of

    # --- looking -----------------------------------------------------------------------------------

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        # Only the last block of a table can have empty slots; sequences that share one count it once.
        pieces: dict[int, OpenPiece] = {}
        entries = 0
        for seq_id, table in self.tables.items():
            if table.on_host:
                continue
            entries += len(table.blocks)
            filled = table.length % self.block_size
            if filled:
                pieces[table.blocks[-1]] = OpenPiece(seq_id, table.length, filled, self.block_size)
        cached = self.num_available - self.pool.num_free
        held = self.pool.num_blocks - self.num_available
        return Snapshot(
            full=(held - len(pieces)) * self.block_size,
            open=list(pieces.values()),
            external=0,  # any free block serves any request
            free=self.pool.num_free * self.block_size,
            cached=cached * self.block_size,
            shared=(entries - held) * self.block_size,
        )

    def check_integrity(self) -> None:
        for seq_id, table in self.tables.items():
            if len(table.blocks) != self.blocks_for(table.length):
                raise AssertionError(f"sequence {seq_id}: {len(table.blocks)} blocks for {table.length} tokens")
        idle = self.cache.idle if self.cache else {}
        for pool, on_host in ((self.pool, False), (self.host_pool, True)):
            tables = (table for table in self.tables.values() if table.on_host == on_host)
            pool.check_integrity((b for table in tables for b in table.blocks), () if on_host else idle)
        if self.cache:
            self.cache.check_integrity()
