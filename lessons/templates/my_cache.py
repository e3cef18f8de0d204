"""Your paged cache: lesson 21 grades this file, and serves with it.

The engine asks a KVCacheManager which slots hold which token. It is all
bookkeeping in ints: K and V are written where `slots` says, and copied
first where `append` says. Five methods are yours, with their lessons:

  slots    lesson 5   from a position to a slot, through the table
  admit    lesson 14  whether a sequence may begin
  append   lesson 5   a table that grows; lesson 12 copy on write
  free     lesson 6   counts, and blocks that come back
  fork     lesson 12  a second table with the same blocks

Grade: paged-ref lesson --grade my_cache.py
Use:   LLM(manager=MyCache(64, 16))
"""

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager, Transfer
from paged_ref.core.memory.usage import Snapshot
from paged_ref.lesson import todo


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

    # --- yours ---------------------------------------------------------

    def slots(self, seq_id, first, count):
        """The slots of positions first to first + count - 1: a list."""
        return todo("4 lines")

    def admit(self, seq_id, tokens, max_len, spare=0):
        """Begin a sequence with an empty table and length 0. Return 0:
        none of its tokens is in the cache yet.

        Raise OutOfBlocks, and change nothing, unless blocks are free for
        all `tokens`, and after that for `spare` slots. If no sequence is
        there, nothing has to stay free.
        """
        return todo("6 lines")

    def append(self, appends):
        """Make room for more tokens: pairs of sequence and count, in order.
        Return what must be copied first: a list, mostly empty.

        If the last block of a sequence is partly filled and another table
        names it, too, the sequence takes a new block in its place, and the
        contents must come along: Transfer("copy", old, new).

        All or none: raise OutOfBlocks, and leave everything as it was, if
        there is no room for all of them. (The scheduler then preempts: it
        frees the last sequence, and asks again.)
        """
        return todo("20 lines")

    def free(self, seq_id):
        """End the sequence. A block that no table names is free again."""
        todo("4 lines")

    def fork(self, parent_id, child_id):
        """Begin `child_id` with all tokens of the parent, in its blocks."""
        todo("4 lines")

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
