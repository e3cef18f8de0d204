"""Kernels that merge attention over parts of the keys: `merge_states` in CUDA, with the sinks; and one part more."""

from __future__ import annotations

import math
from functools import cache

from numba import cuda
from numba.types import float32, int64, uint32

from .cuda_intrinsics import MINUS_INFINITY, ONE, TO_BASE_2, TO_BASE_E, ZERO, exp2
from .flash_variant import MAX_SPLIT_QUERIES, NUM_THREADS, TO


@cache
def combine_kernel(query: str, head_size: int, with_sinks: bool, mixed: bool):
    """The kernel for outputs of the kind `query`. Launch it with NUM_THREADS threads for each item and head."""
    to_out, HEAD_SIZE, SINKS, MIXED = TO[query], head_size, with_sinks, mixed

    @cuda.jit(launch_bounds=(NUM_THREADS, 8))
    def flash_combine(out, lse, part_out, part_lse, query_start_loc, num_heads, num_splits, sinks):
        """Each part counts by its sum of exponentials. All arrays are flat.

        out, lse            [num_tokens, num_heads, head_size] and [num_tokens, num_heads]
        part_out, part_lse  [num_items, num_heads, num_splits, head_size] and [..., num_splits], to base 2
        """
        block, heads = uint32(cuda.blockIdx.x), uint32(num_heads)
        item, head = int64(block // heads), int64(block % heads)
        here, to = int64(block), int64(block)  # which parts, and where their sum goes
        if MIXED:
            seq = item // MAX_SPLIT_QUERIES
            token = query_start_loc[seq] + item % MAX_SPLIT_QUERIES
            end = query_start_loc[seq + 1]
            if token >= end or end - query_start_loc[seq] > MAX_SPLIT_QUERIES:
                return
            to = token * num_heads + head
        highest = MINUS_INFINITY
        if SINKS:
            highest = sinks[head] * TO_BASE_2
        for i in range(num_splits):
            highest = max(highest, part_lse[here * num_splits + i])
        shift = highest if highest > MINUS_INFINITY else ZERO
        for number in range(cuda.threadIdx.x, HEAD_SIZE, NUM_THREADS):
            total, mixed = ZERO, ZERO
            if SINKS:
                total = exp2(sinks[head] * TO_BASE_2 - shift)
            for i in range(num_splits):
                weight = exp2(part_lse[here * num_splits + i] - shift)
                total += weight
                mixed += weight * part_out[(here * num_splits + i) * HEAD_SIZE + number]
            empty = total == ZERO
            out[to * HEAD_SIZE + number] = to_out(ZERO if empty else mixed * (ONE / total))
            if number == 0:
                lse[to] = MINUS_INFINITY if empty else (highest + math.log2(total)) * TO_BASE_E

    return flash_combine


@cuda.jit
def add_part_kernel(out, lse, part, part_lse, head_size):
    """Merge one more part into `out` and `lse`, float32. All arrays are flat, and an empty part changes nothing.

    out, part      [num_rows, head_size]; a row is a query and a head
    lse, part_lse  [num_rows], natural logarithms
    Launch with the grid (num_rows, 1) and any number of threads.
    """
    row = cuda.blockIdx.x
    ours, other = lse[row], part_lse[row]
    cuda.syncthreads()  # All have read lse[row] before a thread writes it.
    if other == float32(-math.inf):
        return
    shift = max(ours, other)
    weight, other_weight = math.exp(ours - shift), math.exp(other - shift)
    norm = float32(1) / (weight + other_weight)
    for i in range(cuda.threadIdx.x, head_size, cuda.blockDim.x):
        at = row * head_size + i
        out[at] = (out[at] * weight + float32(part[at]) * other_weight) * norm
    if cuda.threadIdx.x == 0:
        lse[row] = shift + math.log(weight + other_weight)
