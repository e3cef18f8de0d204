"""Lesson 19: the block size

Question: how large should a block be?
Time: 20 minutes. Needs lessons 5, 12 and 13.

Every lesson so far had blocks of four or of sixteen slots, without saying
why. A block may have one slot, or as many as the longest sequence has. Each
end is a scheme that you know: what do you gain and lose between them?
"""

import numpy as np

from paged_ref.kernels import paged_attention, slot_of
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, table, todo
from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.planner.traces import generated
from paged_ref.tracer import trace

# ## Predict
#
# In blocks of sixteen, the last block of a sequence may have any number of
# empty slots. The second question is lesson 13's: only full blocks are
# found again.

SIZES = (1, 4, 16, 128)
empty = predict("Empty slots of a sequence, on average?", "slots")
found = predict(
    "Of 1,000 tokens seen before, found in blocks of 128?", "tokens"
)

# ## Run
#
# Sixty requests with the mean lengths of the paper's ShareGPT. For each
# block size, the real manager holds each of them at its full length, then
# three samples that each write one token, then a second turn of the chat:
# the first turn, which is in the cache, and a new question.

REQUESTS = generated("sharegpt", 60).requests
WORDS = np.random.default_rng(0).integers(1, 2000, 9999).tolist()


def manager_of(size):
    return PagedManager(CachingBlockPool(8192 // size), size)


def empty_slots(size, length):
    manager = manager_of(size)
    manager.admit(0, WORDS[:length], length)
    manager.append([(0, length)])
    return len(manager.placement(0)) * size - length


def copied_slots(size, prompt_len):
    manager = manager_of(size)
    manager.admit(0, WORDS[:prompt_len], prompt_len)
    manager.append([(0, prompt_len)])
    manager.fork(0, 1)
    manager.fork(0, 2)
    return size * len(manager.append([(0, 1), (1, 1), (2, 1)]))


def found_tokens(size, seen, prompt):
    """How many tokens of `prompt` are found after `seen` has ended."""
    manager = manager_of(size)
    manager.admit(0, seen, len(seen))
    manager.append([(0, len(seen))])
    manager.commit(0, seen, len(seen))
    manager.free(0)
    return manager.admit(1, prompt, len(prompt))


def measure(size):
    waste, copies, hits = 0, 0, 0
    for request in REQUESTS:
        waste += empty_slots(size, request.num_tokens)
        copies += copied_slots(size, request.prompt_len)
        seen = WORDS[: request.num_tokens]
        hits += found_tokens(size, seen, [*seen, 0, 0, 0])
    tokens = sum(request.num_tokens for request in REQUESTS)
    count = len(REQUESTS)
    return waste / count, copies / count, 100 * hits / tokens


measured = {size: measure(size) for size in SIZES}
columns = ("block size", "empty slots", "slots copied", "% found again")
rows = [(n, *(round(x, 1) for x in measured[n])) for n in SIZES]
table("A sequence, on average", columns, rows)
thousand = found_tokens(128, WORDS[:1000], [*WORDS[:1000], 0])
empty.grade(
    measured[16][0], within=0.2, why="none to 15, all as likely: 7.5"
)
found.grade(thousand, why="1,000 // 128 = 7 full blocks, 7 x 128")
claim("blocks of 128 that 1,000 tokens fill", thousand // 128, 7)

# All three grow with the block. A last block has from none to size - 1
# empty slots, so half of that on average, and as many tokens of a known
# beginning are not found. A copy takes a whole block, however few of its
# slots are used. With blocks of one slot nothing is lost at all. Why then
# does a server not take these?

# ## In the kernel
#
# A sequence of two hundred keys, its blocks in any order. The table counts
# the entries of the block table, how often our kernel reads one, and how
# many keys lie side by side in a run, for which one look is enough.

KEYS, HEAD_SIZE = 200, 8


def in_kernel(size):
    """Entries of the table, reads of it, and keys in a run."""
    rng = np.random.default_rng(3)
    blocks = rng.permutation(256 // size)
    needed = -(-KEYS // size)
    shape = (len(blocks), size, 1, HEAD_SIZE)
    keys, values = rng.standard_normal((2, *shape), dtype=np.float32)
    query = np.ones((1, 1, HEAD_SIZE), dtype=np.float32)
    kv = keys, values, blocks[None, :needed], np.array([KEYS])
    with trace.recording(32) as traces:
        paged_attention(query, *kv, backend="trace")
    reads = traces[0].totals()["block_tables"][0]
    slots = [slot_of(blocks, position, size) for position in range(KEYS)]
    breaks = int((np.diff(slots) != 1).sum())
    return needed, reads, round(KEYS / (breaks + 1), 1)


in_kernels = {size: in_kernel(size) for size in SIZES}
columns = ("block size", "entries", "read by our kernel", "in a run")
rows = [(size, *in_kernels[size]) for size in SIZES]
table("One head, 200 keys", columns, rows)
same = all(row[2] == KEYS for row in rows)
claim("our kernel reads an entry for each key, at any size", same)

# The teaching kernel looks up every key, so the size changes nothing for
# it. A fast kernel reads an entry once for each block, and loads the block
# in wide pieces. With blocks of one slot there is a lookup for every key,
# and no run at all.

# ## What must hold
#
# The block size is a matter of cost. A block is copied only if several
# tables share it and one of them writes into it: a full block is never
# written again.


def copies_full_blocks(real):
    def writes_shared_block(self, table, count):
        last = table.blocks[-1:]
        return bool(count and last and self.pool.ref_count[last[0]] > 1)

    return writes_shared_block


break_it(
    "a full block is copied, too, when a sample writes behind it",
    where=(PagedManager, "writes_shared_block"), bug=copies_full_blocks,
    run=lambda: [copied_slots(size, 64) for size in SIZES],
    caught_by="contract",
    text=lambda found: f"slots copied for {SIZES}: {found}",
)  # fmt: skip

# ## Exercise
#
# How many tokens of `prompt` are found in the cache, after a sequence with
# the tokens `seen` has ended? Mind the last token of the prompt: its logits
# choose the next token, so it is always computed.


def my_found(seen, prompt, size):
    return todo("4 lines")


def spec(seen, prompt, size):
    return found_tokens(size, seen, prompt)


seen = WORDS[:10]
cases = [(seen, [*seen, 0, 0], size) for size in (1, 4, 16)]
cases += [(seen[:8], seen[:8], 4), (seen, [*seen[:5], 0, *seen[6:]], 2)]
cases += [(seen, [0, *seen[1:]], 1), (seen[:6], seen, 3)]
hint = "How many first tokens are equal?\nCut that to full blocks."
check(my_found, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# vLLM's default is 16: on ShareGPT sizes from 16 to 128 were best, and on
# short requests sizes over 32 much worse (Kwon et al. 2023, §7.2). SGLang's
# default is a page of one token, which finds every beginning. Kernels that
# want longer runs ask for larger blocks.

# ## Next
#
# See it move: `paged-ref viz --block-size 2 --blocks 24`, and then the same
# memory with `--block-size 8 --blocks 6`.
#
# What it does to a server: `paged-ref compare --block-sizes 1 4 16 128`.
#
# Lesson 20: one block table for several workers.
