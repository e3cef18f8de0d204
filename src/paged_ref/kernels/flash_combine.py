"""The kernel that merges the parts of split sequences: `merge_states` in CUDA, with the sinks."""

from __future__ import annotations

import math
from functools import cache

from numba import cuda
from numba.types import float32, int64

from .flash_intrinsics import exp2
from .flash_variant import NUM_THREADS, TO


@cache
def combine_kernel(query: str, head_size: int, with_sinks: bool):
    """The kernel that merges the parts of split sequences. Grid: num_tokens * num_heads; NUM_THREADS threads."""
    to_out, HEAD_SIZE, SINKS = TO[query], head_size, with_sinks
    MINUS_INFINITY, ZERO, ONE = float32(-math.inf), float32(0), float32(1)
    TO_BASE_2, TO_BASE_E = float32(math.log2(math.e)), float32(math.log(2))

    @cuda.jit
    def flash_combine(out, lse, part_out, part_lse, num_heads, num_splits, sinks):
        """As `merge_states`: each part counts by its sum of exponentials.

        out, lse            as the attention kernel's without splits, flat
        part_out, part_lse  [num_tokens, num_heads, num_splits, head_size] and [..., num_splits], to base 2
        """
        here = int64(cuda.blockIdx.x)
        highest = MINUS_INFINITY
        if SINKS:
            highest = sinks[here % num_heads] * TO_BASE_2
        for i in range(num_splits):
            highest = max(highest, part_lse[here * num_splits + i])
        shift = highest if highest > MINUS_INFINITY else ZERO
        for number in range(cuda.threadIdx.x, HEAD_SIZE, NUM_THREADS):
            total, mixed = ZERO, ZERO
            if SINKS:
                total = exp2(sinks[here % num_heads] * TO_BASE_2 - shift)
            for i in range(num_splits):
                weight = exp2(part_lse[here * num_splits + i] - shift)
                total += weight
                mixed += weight * part_out[(here * num_splits + i) * HEAD_SIZE + number]
            empty = total == ZERO
            out[here * HEAD_SIZE + number] = to_out(ZERO if empty else mixed * (ONE / total))
            if number == 0:
                lse[here] = MINUS_INFINITY if empty else (highest + math.log2(total)) * TO_BASE_E

    return flash_combine
