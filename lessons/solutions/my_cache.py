"""The capstone of lesson 21: one way to write it."""

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager, Transfer
from paged_ref.core.memory.usage import Snapshot


class MyCache(KVCacheManager):
    """`num_blocks` blocks of `block_size` slots."""

    paged = True  # sequences lie in blocks
    can_fork = True  # samples of a prompt share blocks

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_slots = num_blocks * block_size
        self.clear()

    def clear(self):
        """Forget every sequence: all blocks are free."""
        self.tables = {}  # sequence -> its blocks, in order
        self.lengths = {}  # sequence -> tokens that have a slot
        self.ref_count = [0] * self.num_blocks  # tables that name a block
        self.free_blocks = list(range(self.num_blocks))[::-1]  # a stack

    def slots(self, seq_id, first, count):
        table, size = self.tables[seq_id], self.block_size
        positions = range(first, first + count)
        return [table[p // size] * size + p % size for p in positions]

    def admit(self, seq_id, tokens, max_len, spare=0):
        needed = self.blocks_for(len(tokens))
        if self.tables:
            needed += self.blocks_for(spare)
        if needed > len(self.free_blocks):
            raise OutOfBlocks(f"{needed} blocks are needed")
        self.tables[seq_id], self.lengths[seq_id] = [], 0
        return 0

    def append(self, appends):
        tables = {seq: table.copy() for seq, table in self.tables.items()}
        kept = self.lengths.copy(), self.ref_count.copy()
        free_blocks = self.free_blocks.copy()
        copies = []
        try:
            for seq_id, count in appends:
                table, length = self.tables[seq_id], self.lengths[seq_id]
                inside = count and length % self.block_size
                if inside and self.ref_count[table[-1]] > 1:
                    old, table[-1] = table[-1], self.take()
                    self.ref_count[old] -= 1
                    copies.append(Transfer("copy", old, table[-1]))
                self.lengths[seq_id] += count
                while len(table) * self.block_size < length + count:
                    table.append(self.take())
        except OutOfBlocks:
            self.tables, self.free_blocks = tables, free_blocks
            self.lengths, self.ref_count = kept
            raise
        return copies

    def take(self):
        if not self.free_blocks:
            raise OutOfBlocks("no block is free")
        block = self.free_blocks.pop()
        self.ref_count[block] = 1
        return block

    def free(self, seq_id):
        del self.lengths[seq_id]
        for block in reversed(self.tables.pop(seq_id)):
            self.ref_count[block] -= 1
            if not self.ref_count[block]:
                self.free_blocks.append(block)

    def fork(self, parent_id, child_id):
        self.tables[child_id] = self.tables[parent_id].copy()
        self.lengths[child_id] = self.lengths[parent_id]
        for block in self.tables[child_id]:
            self.ref_count[block] += 1

    # --- given ---------------------------------------------------------

    def blocks_for(self, num_tokens):
        return -(-num_tokens // self.block_size)

    def length(self, seq_id):
        return self.lengths[seq_id]

    def placement(self, seq_id):
        return self.tables[seq_id]

    def max_slots_needed(self, prompt_len, max_len, n=1):
        """Slots that `n` samples of a prompt hold at the worst."""
        shared = prompt_len // self.block_size if n > 1 else 0
        blocks = shared + n * (self.blocks_for(max_len) - shared)
        return blocks * self.block_size

    def snapshot(self, next_request=None):
        """What is held, for the figures of a run."""
        free = len(self.free_blocks) * self.block_size
        return Snapshot(self.num_slots - free, [], external=0, free=free)

    def check_integrity(self):
        """Each count is the number of tables that name the block."""
        held = [block for table in self.tables.values() for block in table]
        counts = [held.count(block) for block in range(self.num_blocks)]
        assert counts == self.ref_count, f"{self.ref_count} for {counts}"
        assert sorted(self.free_blocks) == [
            block for block, count in enumerate(counts) if not count
        ]
