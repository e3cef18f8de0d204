"""Attention over K and V in blocks: the teaching CUDA kernel, to be read line by line.

This is the kernel of `naive.py` through block tables. The diff of the two files is the lesson.

One CUDA block works out one head of one query token. Its threads go through the keys in tiles, a tile
having as many keys as the block has threads. Three steps for each tile, with a barrier between them:
  scores   a thread for each key         the dot product of the query with that key
  softmax  all threads together          the tile's largest score, then its weights and their sum
  values   a thread for each dimension   the weighted sum of the tile's values
The softmax is online (Milakov and Gimelshein 2018): what came before a tile with a larger score is scaled
down to it. So shared memory is bounded, however long the sequence.
"""

from __future__ import annotations

import math

from numba import cuda
from numba.types import float32, int64

from . import addressing

# The package's own two lines, compiled into the kernel (inline: there is no call). They cost a division and
# a remainder for each key; the loops over the elements of a key and of a value only use the slot.
slot_of = cuda.jit(device=True, inline="always")(addressing.slot_of)

MAX_THREADS = 128
MAX_HEAD_SIZE = 256


@cuda.jit
def attention_kernel(
    out, lse, query, keys, values,
    block_tables, block_size,
    seq_lens, query_start_loc, scale,
):  # fmt: skip
    """Fill `out [num_tokens, num_heads, head_size]` and `lse [num_tokens, num_heads]` float32.

    query            [num_tokens, num_heads, head_size]
    keys, values     [num_slots, num_kv_heads, head_size]
    block_tables     [num_seqs, max_blocks]  logical block to physical block, of block_size slots
    seq_lens         [num_seqs]      keys of each sequence, this step's tokens included
    query_start_loc  [num_seqs + 1]  cumulative query counts
    scale            float32

    Launch with the grid (num_tokens, num_heads) and a power of two of threads, at most MAX_THREADS.
    """
    token, head = cuda.blockIdx.x, cuda.blockIdx.y
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    head_size = query.shape[2]
    kv_head = head // (query.shape[1] // keys.shape[1])  # GQA: a group of query heads shares one KV head

    # Shared memory: one copy for the CUDA block, seen by all its threads. It starts out as garbage.
    q = cuda.shared.array(MAX_HEAD_SIZE, float32)  # the query, scaled
    acc = cuda.shared.array(MAX_HEAD_SIZE, float32)  # the weighted sum of the values so far
    slots = cuda.shared.array(MAX_THREADS, int64)  # where the tile's keys lie
    weights = cuda.shared.array(MAX_THREADS, float32)  # the tile's softmax weights, not yet normalised
    work = cuda.shared.array(MAX_THREADS, float32)  # scratch of the two reductions

    # Whose token is this, and how many keys does it see? Causal, aligned at the end of the sequence.
    seq = 0
    while query_start_loc[seq + 1] <= token:
        seq += 1
    query_len = query_start_loc[seq + 1] - query_start_loc[seq]
    query_position = seq_lens[seq] - query_len + token - query_start_loc[seq]
    num_keys = query_position + 1  # 0 or less where the query sees none: then no tile is done

    for d in range(thread, head_size, num_threads):
        q[d] = float32(query[token, head, d]) * scale
        acc[d] = float32(0)
    cuda.syncthreads()  # Each thread reads all of q, and wrote only its own part of it.

    highest = float32(-math.inf)  # the largest score so far; every thread holds the same
    total = float32(0)  # the sum of the weights so far, relative to `highest`
    for tile in range(0, num_keys, num_threads):
        # Scores: thread t takes key `tile + t`.
        position = tile + thread
        score = float32(-math.inf)  # past the last key: exp(-inf) = 0 adds nothing
        if position < num_keys:
            slot = slot_of(block_tables[seq], position, block_size)
            slots[thread] = slot
            score = float32(0)
            for d in range(head_size):
                score += q[d] * float32(keys[slot, kv_head, d])

        # The tile's largest score: in each round the lower half takes the larger of two, until one is left.
        work[thread] = score
        cuda.syncthreads()  # The first round reads what other threads have just written.
        half = num_threads // 2
        while half > 0:
            if thread < half:
                work[thread] = max(work[thread], work[thread + half])
            cuda.syncthreads()  # Outside the `if`: a barrier that some threads never reach hangs the rest.
            half //= 2
        new_highest = max(highest, work[0])
        cuda.syncthreads()  # All have read work[0]. Without this, thread 0 may overwrite it first.

        # The tile's weights, and their sum in the same way.
        weight = math.exp(score - new_highest)
        weights[thread] = weight
        work[thread] = weight
        cuda.syncthreads()  # As above; from here on all of `weights` is there, too.
        half = num_threads // 2
        while half > 0:
            if thread < half:
                work[thread] += work[thread + half]
            cuda.syncthreads()
            half //= 2
        shrink = math.exp(highest - new_highest)  # what came before, relative to the new maximum; first: 0
        total = total * shrink + work[0]
        highest = new_highest

        # Values: thread t takes dimensions t, t + num_threads, ... No other thread touches their `acc`.
        for d in range(thread, head_size, num_threads):
            mixed = acc[d] * shrink
            for key in range(min(num_threads, num_keys - tile)):
                mixed += weights[key] * float32(values[slots[key], kv_head, d])
            acc[d] = mixed
        cuda.syncthreads()  # The next tile overwrites slots, weights and work: first all must be done.

    for d in range(thread, head_size, num_threads):
        out[token, head, d] = acc[d] / total if total != 0 else float32(0)
    if thread == 0:
        lse[token, head] = highest + math.log(total) if total != 0 else float32(-math.inf)
