"""Lesson 9: the paged kernel

Question: what changes in the kernel when K and V lie in pages?
Time: 40 minutes. Needs lessons 5 and 8.

This lesson joins the block table of lesson 5 and the kernel of lesson 8.
PagedAttention sounds like a large change. How much of the kernel changes we
see first line by line, and then access by access.
"""

import difflib
import inspect

import numpy as np

from paged_ref.core.attention import naive, paged
from paged_ref.kernels import naive_attention
from paged_ref.kernels import paged_attention, slot_of
from paged_ref.tracer import trace
from paged_ref.lesson import break_it, build, check, claim, plant
from paged_ref.lesson import predict, show, table, todo

# ## Predict
#
# For each sequence the kernel gets a block table in place of the slot where
# its region begins. Two sequences, of six and of three keys; two heads. All
# threads together: how often do they read an entry of a block table?

changed = predict("How many lines of the kernel's code change?", "lines")
extra = predict("How many reads of block table entries?", "reads")

# ## Run
#
# First the source, without the docstring.


def code_of(kernel):
    source = inspect.getsource(kernel.py_func)
    parts = source.split('"""')  # the middle one is the docstring
    return (parts[0] + parts[2]).splitlines()


pair = code_of(naive.attention_kernel), code_of(paged.attention_kernel)
diff = [d for d in difflib.ndiff(*pair) if d[0] in "+-"]
show("\n".join(diff))
changed.grade(
    sum(d[0] == "+" for d in diff),
    why="one names other arguments, and one finds the slot of a key",
)

# One line names the arguments, the other finds the slot of a key. Now both
# kernels get the same keys: in a region for each sequence, and in blocks of
# four slots. All other slots are NaN.

HEADS, HEAD_SIZE, BLOCK_SIZE, SEQ_LENS = 2, 8, 4, np.array([6, 3])
TABLES = np.array([[3, 1], [2, -1]])
STARTS = np.array([1, 10])
draw = np.random.default_rng(0).standard_normal
query = draw((2, HEADS, HEAD_SIZE), dtype=np.float32)
dense = np.full((2, 16, 1, HEAD_SIZE), np.nan, dtype=np.float32)
pages = dense.copy()
slot_pairs = set()
for s, seq_len in enumerate(SEQ_LENS):
    for position in range(seq_len):
        slot = slot_of(TABLES[s], position, BLOCK_SIZE)
        kv = draw((2, 1, HEAD_SIZE), dtype=np.float32)
        dense[:, STARTS[s] + position] = pages[:, slot] = kv
        slot_pairs.add((int(STARTS[s] + position), int(slot)))
blocks = pages.reshape(2, -1, BLOCK_SIZE, 1, HEAD_SIZE)


def run(attention, *memory):
    with trace.recording(num_threads=4) as traces:
        out = attention(query, *memory, SEQ_LENS, backend="trace")
    return out, traces[0]


naive_out, one = run(naive_attention, *dense, STARTS)
paged_out, two = run(paged_attention, *blocks, TABLES)
rows = []
for name in ("keys", "values", "starts", "block_tables"):
    counts = [t.totals().get(name, (0, 0))[0] for t in (one, two)]
    rows.append((name, *counts))
table("Elements read", ("array", "naive", "paged"), rows)
extra.grade(
    two.totals()["block_tables"][0],
    why="one for each key and head: (6 + 3) x 2",
)

# ## What must hold
#
# The same numbers are added in the same order, so the answers agree to the
# last bit. And the k-th key that one kernel reads is the k-th key that the
# other kernel reads, each in its own slot. The price of a block table is
# one entry for each key and head, where the naive kernel read the start.

claim("bits that differ", int((naive_out != paged_out).sum()), 0)
read = [record.slots("keys").tolist() for record in (one, two)]
both = set(zip(*read, strict=True))
claim("each key is read where it lies", both, slot_pairs)
claim("elements of K read", rows[0][2], rows[0][1])
claim("table entries for each key and head", rows[3][2] // (9 * HEADS), 1)

# A kernel that reads the table of another sequence passes every test with
# one sequence.

BUG = "the first sequence's block table for all"
break_it(
    BUG, where=(paged, "attention_kernel"),
    bug=lambda real: plant(real, BUG),
    run=lambda: run(paged_attention, *blocks, TABLES)[0],
    caught_by="contract",
)  # fmt: skip

# ## Exercise
#
# The two lines cost a division and a remainder for each key. A fast kernel
# goes through the blocks instead, and reads each in one run. Give the runs:
# (first slot, how many) of each block of a sequence.


def my_runs(block_table, seq_len, block_size):
    """A list of (first slot, number of slots), in order."""
    return todo("5 lines")


def spec(block_table, seq_len, block_size):
    runs = {}
    for position in range(seq_len):
        first = slot_of(block_table, position, block_size)
        runs.setdefault(position // block_size, [first, 0])[1] += 1
    return [tuple(run) for run in runs.values()]


cases = [([3, 1, 6], n, size) for n in (1, 4, 5, 8, 11) for size in (4, 16)]
hint = (
    "A block gives one run, and its slots lie side by side.\n"
    "All blocks are full but the last: min(block_size, what is left)."
)
mine = check(my_runs, spec=spec, cases=cases, hint=hint)

runs = mine([3, 1], 6, BLOCK_SIZE)  # the first sequence, read by runs
read = np.concatenate([pages[0, at : at + n] for at, n in runs])
claim("the keys in order", bool((read == dense[0, 1:7]).all()))

# And the table lookup in a kernel of your own: the third step of
# `my_kernel.py`, where your kernel of lesson 8 learns to read pages. When
# it is right, `paged-ref walk --mine my_kernel.py` steps through it.

build("my_paged_attention")

# ## In production systems
#
# vLLM's first paged kernel took 20% to 26% more time than a contiguous one
# (Kwon et al. 2023, §7.1). Later kernels read long runs. Still, a cache in
# one piece of virtual memory served up to 1.23 times as many requests
# (Prabhu et al. 2025).

# ## Next
#
# See it move: `paged-ref walk --at block_tables`.
#
# Lesson 10: softmax in one pass, and one long sequence over many blocks.
