"""Lesson 6: the block pool

Question: what hands out the blocks, and how does it know which are free?
Time: 15 minutes. Needs lesson 5.

A block table can point anywhere, so any free block is as good as any other.
That makes the allocator of a paged cache as simple as can be: a stack of
block numbers, and for each block a count of the tables that point to it.
"""

from copy import deepcopy

from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo
from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.paged import PagedManager, Table

# ## Predict
#
# Six blocks of four slots, handed out in the order 0, 1, 2 and so on.
# Sequence A has nine tokens and B has five. Then A ends, and C begins with
# six tokens. The free list is a stack: the block that was freed last is
# handed out first. When a sequence ends, its last block is freed first.

free = predict("How many blocks are free while A and B run?", "blocks")
first = predict("Which block does C get first?")

# ## Run

manager = PagedManager(BlockPool(6), block_size=4)
rows = []


def note(what):
    tables = [f"{'ABC'[i]} {t.blocks}" for i, t in manager.tables.items()]
    free_list = " ".join(map(str, manager.pool.free_blocks))
    rows.append((what, free_list, "  ".join(tables)))


def begin(seq_id, length):
    manager.admit(seq_id, range(length), max_len=99)
    manager.append([(seq_id, length)])
    note(f"{'ABC'[seq_id]} begins: {length} tokens")


begin(0, 9)
begin(1, 5)
free.grade(manager.pool.num_free, why="A takes 3 and B takes 2 of the 6")
manager.free(0)
note("A ends")
begin(2, 6)
first.grade(
    manager.placement(2)[0],
    why="A gives back 2, 1 and then 0, so 0 lies on top of the stack",
)
manager.append([(1, 4)])
note("B grows by 4 tokens")
columns = ("", "free, the next one first", "tables")
table("The pool", columns, rows)

# ## Counts
#
# Why a count, and not a mark? Because tables can share: a request for two
# answers gets two sequences with the same blocks (see lesson 12). A block
# is free when no table points to it any more.

trial = deepcopy(manager)  # so that the next parts have C as it is
trial.fork(2, 3)
counts = [trial.pool.ref_count[b] for b in trial.placement(2)]
claim("tables that point to the blocks of C", counts, [2, 2])
before = trial.pool.num_free
trial.free(2)
claim("blocks that the end of C frees", trial.pool.num_free - before, 0)
trial.free(3)
claim("and the end of its copy, too", trial.pool.num_free - before, 2)

# ## What must hold
#
# Each block is free or held, never both, and its count is the number of
# tables that point to it. `check_integrity` counts again.

manager.check_integrity()
held = {block for t in manager.tables.values() for block in t.blocks}
claim("free and held blocks", manager.pool.num_free + len(held), 6)

# And an empty pool refuses before it changes anything, so the scheduler can
# wait, or free some blocks, and ask again.

try:
    manager.append([(1, 99), (2, 99)])
except OutOfBlocks as error:
    print(f"  {error}")
lengths = [manager.length(1), manager.length(2)]
claim("tokens of B and of C, as before", lengths, [9, 6])

# What if the first `release` frees a block to which another table points?
# The next sequence gets the block, and writes its K and V over those of the
# sequence that still has it.


def frees_too_early(real):
    def release(self, block_id):
        self.ref_count[block_id] = 1  # as if no other table pointed to it
        real(self, block_id)

    return release


def one_of_two_ends():
    manager = PagedManager(BlockPool(6), block_size=4)
    manager.admit(0, range(8), max_len=8)
    manager.append([(0, 8)])
    manager.fork(0, 1)
    manager.free(0)
    manager.check_integrity()


break_it(
    "a block is freed when the first of its tables ends",
    where=(BlockPool, "release"), bug=frees_too_early,
    run=one_of_two_ends, caught_by="integrity",
)  # fmt: skip

# ## Exercise
#
# A sequence ends: its table is `blocks`. Take its blocks back, the last one
# first. `ref_count[block]` is the number of tables that name a block.
# `free` lists the free blocks, and the last of the list is handed out next.


def my_release(blocks, ref_count, free):
    """Correct `ref_count` and `free`. Returns nothing."""
    todo("4 lines")


real_free = PagedManager.free


def spec(blocks, ref_count, free):
    held = [block for block, count in enumerate(ref_count) if count]
    pool = BlockPool(len(ref_count), [*held, *reversed(free)])
    for _ in held:
        pool.allocate()
    pool.ref_count = ref_count
    manager = PagedManager(pool, block_size=1)
    manager.tables[0] = Table(blocks, len(blocks))
    real_free(manager, 0)
    free[:] = reversed(pool.free_blocks)


cases = [([3, 1], [0, 1, 1, 1], [0]), ([0, 2], [2, 0, 1], [1])]
cases += [([1, 0], [2, 3], []), ([], [0, 1], [0])]
hint = (
    "A block can be in several tables. When is it free?\n"
    "One table less for each block; at zero it goes to the end of `free`."
)
mine = check(my_release, spec=spec, cases=cases, hint=hint)

# The engine's pool runs with yours beside it: both must leave the same.


def both(manager, seq_id):
    pool, blocks = manager.pool, manager.tables[seq_id].blocks
    counts, free = [*pool.ref_count], pool.free_blocks[::-1]
    mine(blocks, counts, free)
    real_free(manager, seq_id)
    found = counts, free[::-1]
    claim("as the pool", found == (pool.ref_count, pool.free_blocks))


with plug_in((PagedManager, "free"), both):
    one_of_two_ends()  # which checks the integrity of the pool

# ## In production systems
#
# vLLM's free list is a linked list: its prefix cache takes blocks out of
# the middle, and hands out the block that was free the longest. Counts,
# tables and the refusal are as here. SGLang's default is a page of one
# token.

# ## Next
#
# See it move: `paged-ref viz --at N`, the end of a sequence.
#
# Lesson 7: K and V in these blocks, and the simplest way to read them.
