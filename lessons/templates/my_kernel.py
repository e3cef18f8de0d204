"""Your kernel, in three steps: lessons 8 and 9 grade this file.

A kernel is the program of one thread. The tracer runs it here, for all
threads, without a GPU. It records every access, and it stops at a read
outside of an array, at shared memory that nothing wrote, and at two
threads that touch one element without a barrier between them.

In a kernel: `cuda.threadIdx.x` is the number of the thread in its CUDA
block, `cuda.blockDim.x` the number of threads, `cuda.blockIdx.x` the
number of the CUDA block. `float32(0)` begins a sum in float32.

Grade: paged-ref lesson --grade my_kernel.py
Look:  paged-ref walk --mine my_kernel.py, when step 3 is written
"""

import math

from numba import cuda
from numba.types import float32, int64

from paged_ref.lesson import todo

MAX_THREADS = 128  # of a CUDA block: shared arrays have a fixed size


@cuda.jit
def my_scores(scores, query, keys, start, num_keys):
    """Step 1, lesson 8: the score loop.

    scores [num_keys]             to fill: the dot product of query and key
    query  [head_size]
    keys   [num_slots, head_size] key i of the sequence is in slot start + i

    There may be more keys than threads: thread t takes the keys t,
    t + num_threads, and so on. No key is read twice, and each score is
    written once: a sum of many terms grows in a variable of the thread.
    """
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    todo("5 lines")


@cuda.jit
def my_dense_attention(out, query, keys, values, start, num_keys, scale):
    """Step 2, lesson 8: the online softmax.

    out          [head_size]       to fill
    query        [head_size]
    keys, values [num_slots, head_size]

    There are as many threads as a head has elements. For each tile of
    `num_threads` keys:
      1. thread t scores key t of the tile (dot product times `scale`), and
         puts the score into shared memory, where all threads read it;
      2. each thread takes the largest score so far, and shrinks its sums by
         exp(largest before - largest now);
      3. each thread adds the weights exp(score - largest) to its total, and
         element `thread` of each value, times the weight, to its sum.
    At the end thread t writes out[t] = sum / total. Where must the threads
    wait for each other? `cuda.syncthreads()` is the barrier.
    """
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    scores = cuda.shared.array(MAX_THREADS, float32)
    highest, total, mixed = float32(-math.inf), float32(0), float32(0)
    todo("20 lines")


@cuda.jit
def my_paged_attention(
    out, query, keys, values, block_tables, block_size, seq_lens, scale
):
    """Step 3, lesson 9: many sequences and heads, through block tables.

    out, query   [num_seqs, num_heads, head_size]
    keys, values [num_slots, num_kv_heads, head_size]
    block_tables [num_seqs, max_blocks] logical block to physical block
    seq_lens     [num_seqs]             keys of each sequence

    One CUDA block computes one head of one sequence: blockIdx.x is the
    sequence, blockIdx.y the head. A group of query heads shares a KV head:
    heads 0 and 1 of two share KV head 0 of one.

    Take your kernel of step 2, and change how it finds a slot: no table
    entry is to be read more than once for a key. So note the slots of the
    tile in shared memory, beside its scores.
    """
    seq, head = cuda.blockIdx.x, cuda.blockIdx.y
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    kv_head = head // (query.shape[1] // keys.shape[1])
    scores = cuda.shared.array(MAX_THREADS, float32)
    todo("25 lines")
