"""The three kernels of lessons 8 and 9: one way to write them."""

import math

from numba import cuda
from numba.types import float32, int64

MAX_THREADS = 128


@cuda.jit
def my_scores(scores, query, keys, start, num_keys):
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    for key in range(thread, num_keys, num_threads):
        score = float32(0)
        for d in range(query.shape[0]):
            score += query[d] * keys[start + key, d]
        scores[key] = score


@cuda.jit
def my_dense_attention(out, query, keys, values, start, num_keys, scale):
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    scores = cuda.shared.array(MAX_THREADS, float32)
    highest, total, mixed = float32(-math.inf), float32(0), float32(0)
    for tile in range(0, num_keys, num_threads):
        count = min(num_threads, num_keys - tile)
        if thread < count:
            score = float32(0)
            for d in range(query.shape[0]):
                score += query[d] * keys[start + tile + thread, d]
            scores[thread] = score * scale
        cuda.syncthreads()  # all scores of the tile are there
        before = highest
        for key in range(count):
            highest = max(highest, scores[key])
        shrink = math.exp(before - highest)
        total, mixed = total * shrink, mixed * shrink
        for key in range(count):
            weight = math.exp(scores[key] - highest)
            total += weight
            mixed += weight * values[start + tile + key, thread]
        cuda.syncthreads()  # the next tile overwrites the scores
    out[thread] = mixed / total


@cuda.jit
def my_paged_attention(
    out, query, keys, values, block_tables, block_size, seq_lens, scale
):
    seq, head = cuda.blockIdx.x, cuda.blockIdx.y
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    kv_head = head // (query.shape[1] // keys.shape[1])
    scores = cuda.shared.array(MAX_THREADS, float32)
    slots = cuda.shared.array(MAX_THREADS, int64)
    highest, total, mixed = float32(-math.inf), float32(0), float32(0)
    for tile in range(0, seq_lens[seq], num_threads):
        count = min(num_threads, seq_lens[seq] - tile)
        if thread < count:
            key = tile + thread
            block = block_tables[seq, key // block_size]
            slot = block * block_size + key % block_size
            slots[thread] = slot
            score = float32(0)
            for d in range(query.shape[2]):
                score += query[seq, head, d] * keys[slot, kv_head, d]
            scores[thread] = score * scale
        cuda.syncthreads()  # all scores and slots of the tile are there
        before = highest
        for key in range(count):
            highest = max(highest, scores[key])
        shrink = math.exp(before - highest)
        total, mixed = total * shrink, mixed * shrink
        for key in range(count):
            weight = math.exp(scores[key] - highest)
            total += weight
            mixed += weight * values[slots[key], kv_head, thread]
        cuda.syncthreads()  # the next tile overwrites both arrays
    out[seq, head, thread] = mixed / total
