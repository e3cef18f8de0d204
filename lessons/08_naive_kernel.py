"""Lesson 8: the naive kernel, thread by thread

Question: which thread of an attention kernel reads what, and when?
Time: 60 minutes. Needs lesson 7.

A GPU runs thousands of threads of one program. Before its threads follow
block tables, here is the kernel for memory in one piece: two pages of code,
src/paged_ref/core/attention/naive.py. Open the file beside this lesson. The
kernel runs here without a GPU, in a tracer that records every access.
"""

import numpy as np

from paged_ref.core.attention import naive
from paged_ref.kernels import naive_attention
from paged_ref.tracer import trace
from paged_ref.lesson import break_it, build, claim, plant
from paged_ref.lesson import predict, table

# ## Predict
#
# One query token with two heads, which share one head of K and V. Its six
# keys lie in slots 2 to 7. One **CUDA block** (not a block of the cache)
# computes one head: here with four threads, on a GPU with many more. The
# threads take the keys in **tiles**, as many keys at a time as there are
# threads. Between the steps the threads wait for each other at a
# **barrier**, since one thread reads what another wrote.

HEADS, HEAD_SIZE, START, KEYS, THREADS = 2, 8, 2, 6, 4

reads = predict("How many times is each element of K read?", "times")
busy = predict("How many keys does thread 0 take?", "keys")
waits = predict("At how many barriers does each thread wait?", "barriers")

# ## Run

draw = np.random.default_rng(0).standard_normal


def run(num_threads=THREADS, num_keys=KEYS):
    query = draw((1, HEADS, HEAD_SIZE), dtype=np.float32)
    keys, values = draw((2, 16, 1, HEAD_SIZE), dtype=np.float32)
    kv = keys, values, np.array([START]), np.array([num_keys])
    with trace.recording(num_threads) as traces:
        out = naive_attention(query, *kv, backend="trace")
    wanted = naive_attention(query, *kv, backend="reference")
    return traces[0], np.abs(out - wanted).max()


record, error = run()
claim("its answer is that of the array code", bool(error < 1e-6))
keys_read = record.select("keys", block=0)
rows = []
for thread in range(THREADS):
    own = keys_read.select(thread=thread)
    slots = list(dict.fromkeys(own.slots("keys").tolist()))
    rows.append((thread, str(slots), len(own)))
columns = ("thread", "slots, in its order", "elements of K read")
table("Scores: which thread reads which key, for head 0", columns, rows)
busy.grade(
    len(set(keys_read.select(thread=0).slots("keys").tolist())),
    why="keys 0 and 4: the next key of a thread is four further",
)

# Then the threads find the largest score together, make weights of the
# scores, and add the weights up. In each round of these sums half of the
# threads go on. For the values the work is shared in another way: each
# thread takes some dimensions of every value. So a thread needs the weights
# that other threads have made.

rows = [(name, *counts) for name, counts in record.totals().items()]
table("Both heads together", ("array", "reads", "writes"), rows)
reads.grade(
    int(record.counts("keys")[START].max()),
    why="two query heads share it, and each has a CUDA block of its own",
)
waits.grade(
    int(record.round.max()),
    why="1 for the query, and in each of 2 tiles 1 for the scores, 2 for\n"
    "rounds of the largest, 1, 1 for the weights, 2 for rounds of the\n"
    "sum, and 1 at the end: 1 + 2 x 8 = 17",
)

# ## What must hold
#
# Each visible key is read once for each query head, and no other key.

counts = record.counts("keys")
visible = counts[START : START + KEYS]
claim("reads of each element of K", np.unique(visible).tolist(), [HEADS])
claim("reads of all others", int(counts.sum() - visible.sum()), 0)

# And no thread reads what another thread writes without a barrier between
# the two. Without one of the barriers the kernel may still be right, today,
# on your GPU. The tracer names the two threads and the place. The barrier
# that is missing here comes after all threads have read the largest score,
# and before the first of them uses the scratch array again.

BUG = "no barrier after the largest score is read"
break_it(
    BUG, where=(naive, "attention_kernel"),
    bug=lambda real: plant(real, BUG),
    run=lambda: run()[0].totals(), caught_by="tracer",
)  # fmt: skip

# ## Exercise
#
# Now you write the kernel, in a file of your own: `my_kernel.py`, with the
# score loop as its first step. The line `position = tile + thread` of the
# real kernel says which keys a thread takes. Your kernel runs in the
# tracer, and its reads are compared with those of the real one.

build("my_scores")

# The second step is the **online softmax**. A weight is exp(score - largest
# score), so that no exp overflows, and the sums are relative to the largest
# score so far. Where a tile has a larger one, what was summed before
# shrinks by exp(largest before - largest now). Your threads need what other
# threads have computed, so barriers are yours to place: one short way needs
# two for each tile. (The real kernel has more: its threads share the work
# of the largest score and of the sum, where yours do all of it.)

build("my_dense_attention")

# ## In production systems
#
# FlashAttention has the same loop over tiles, and carries sums from tile to
# tile (lesson 10). Its threads work on small matrices together, and load
# the next tile while they compute with this one.

# ## Next
#
# See it move: `paged-ref walk --kernel naive --at keys`.
#
# Lesson 9: the same kernel through block tables, and the lines that change.
