"""Lesson 6: the block pool

Question: who hands out the blocks, and how does it know which are free?
Time: 15 minutes. Needs lesson 5.

A block table can point anywhere, so any free block is as good as any other.
That makes the allocator of a paged cache the simplest there is: a stack of
numbers, and beside it, for each block, how many tables point to it.
"""

from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo
from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.paged import PagedManager

# ## Predict
#
# Six blocks of four slots. A has nine tokens and B has five. Then A ends
# and C comes, with six tokens. The free list is a stack: what was freed
# last is handed out first. A's last block is given back first.

free = predict("How many blocks are free while A and B run?", "blocks")
first = predict("Which block does C get first?")

# ## Run

manager = PagedManager(num_blocks=6, block_size=4)
rows = []


def note(what):
    tables = [f"{'ABC'[i]} {t.blocks}" for i, t in manager.tables.items()]
    free_list = " ".join(map(str, manager.pool.free_blocks))
    rows.append((what, free_list, "  ".join(tables)))


def begin(seq_id, length):
    manager.admit(seq_id, range(length), max_tokens=99)
    manager.append([(seq_id, length)])
    note(f"{'ABC'[seq_id]} begins: {length} tokens")


begin(0, 9)
begin(1, 5)
free.grade(manager.pool.num_free)
manager.free(0)
note("A ends")
begin(2, 6)
first.grade(manager.block_table(2)[0])
manager.append([(1, 4)])
note("B grows by 4 tokens")
table("Next to be handed out first", ("", "free", "tables"), rows)

# ## Counts
#
# Why a count, and not a mark? Because tables can share: a request for two
# answers gets two sequences with the same blocks (lesson 12 has the rest).
# A block is free when the last table lets go of it.

manager.fork(2, 3)
counts = [manager.pool.ref_count[b] for b in manager.block_table(2)]
claim("tables that point to the blocks of C", counts, [2, 2])
before = manager.pool.num_free
manager.free(2)
claim("blocks that its end frees", manager.pool.num_free - before, 0)
manager.free(3)
claim("and its twin's end", manager.pool.num_free - before, 2)

# ## What must hold
#
# Free and held blocks are all blocks, each once, and each count is that of
# the tables that point there. `check_integrity` counts anew.

manager.check_integrity()
held = {block for t in manager.tables.values() for block in t.blocks}
claim("free and held blocks", manager.pool.num_free + len(held), 6)

# And an empty pool says no before anything has changed, so that whoever
# asked can wait, or make room, and ask again.

try:
    manager.append([(1, 99)])
except OutOfBlocks as error:
    print(f"  {error}")
claim("tokens of B, as before", manager.length(1), 9)

# What if a block becomes free at the first `release`, whoever else points
# to it? The next sequence gets it and writes its K and V over a stranger's.


def frees_at_once(real):
    def release(self, block_id, keep_idle=False):
        self.ref_count[block_id] -= 1
        self._free.append(block_id)
        return True

    return release


def one_of_two_ends():
    manager = PagedManager(num_blocks=6, block_size=4)
    manager.admit(0, range(8), max_tokens=8)
    manager.append([(0, 8)])
    manager.fork(0, 1)
    manager.free(0)
    manager.check_integrity()


break_it(
    "a block is free as soon as one of its tables lets go",
    where=(BlockPool, "release"), bug=frees_at_once,
    run=one_of_two_ends, caught_by="integrity",
)  # fmt: skip

# ## Exercise
#
# Hand out a block. The last entry of `free` is the next one to go.


def my_allocate(free, ref_count):
    """A block off `free`, now with one table. OutOfBlocks if none is."""
    return todo("5 lines")


pool_allocate = BlockPool.allocate


def spec(free, ref_count):
    pool = BlockPool(len(ref_count))
    pool._free, pool.ref_count = free, ref_count
    return pool_allocate(pool)


cases = [([2, 0], [0, 1, 0]), ([3], [1, 2, 1, 0]), ([], [1, 1]), ([0], [0])]
hint = "list.pop() takes the last one. Look first whether there is one."
mine = check(my_allocate, spec=spec, cases=cases, hint=hint)

where = (BlockPool, "allocate")
with plug_in(where, lambda pool: mine(pool._free, pool.ref_count)):
    one_of_two_ends()  # and the books balance

# ## In production systems
#
# vLLM's free list is a linked one: its prefix cache takes blocks out of the
# middle, and gives out what was free the longest. Counts, tables and the
# refusal are as here. SGLang's default is a page of one token.

# ## Next
#
# Lesson 7: the K and V themselves, and the simplest way to read them.
