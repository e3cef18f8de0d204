# mypy: ignore-errors
"""The last stage of the tuned kernel: the warps' results are merged and written. See flash_stages.py."""

from __future__ import annotations

import math

from numba import cuda
from numba.types import float32

from .cuda_intrinsics import MINUS_INFINITY, ONE, TO_BASE_2, TO_BASE_E, ZERO, device, exp2
from .flash_layout import Layout
from .flash_variant import EVERY_LANE, MAX_SPLIT_QUERIES, NUM_THREADS, ROWS, TO


def outputs(layout: Layout):
    """Makes `store_shared`, by which warps hand over their results, and `write_rows`, which merges and writes them."""
    to_out, HEAD_SIZE, GROUP = TO[layout.variant.query], layout.variant.head_size, layout.variant.group_size
    SPLIT, MIXED, ROWS_PER_BLOCK = layout.variant.split, layout.variant.mixed, layout.variant.rows_per_block
    SINKS, QUANTIZED, PARTS = layout.variant.sinks and not layout.variant.split, layout.quantized, layout.parts
    PER_CHUNK, STRIDE, FACTOR, O_SIZE = layout.per_chunk, layout.stride, float32(layout.element.factor), layout.o_size

    @device
    def store_shared(shared_o, shared_highest, shared_total, o, highest, total, warp, g, t):
        """Write row `8 * warp + g` of each array, and wait for all warps."""
        total += cuda.shfl_xor_sync(EVERY_LANE, total, 1)
        total += cuda.shfl_xor_sync(EVERY_LANE, total, 2)
        for i in range(O_SIZE // 2):  # number i of a chunk of rows 2t and 2t + 1
            shared_o[(ROWS * warp + 2 * t) * STRIDE + 8 * i + g] = o[2 * i]
            shared_o[(ROWS * warp + 2 * t + 1) * STRIDE + 8 * i + g] = o[2 * i + 1]
        if t == 0:
            shared_highest[ROWS * warp + g] = highest
            shared_total[ROWS * warp + g] = total
        cuda.syncthreads()

    @device
    def merge(shared_o, shared_highest, shared_total, r, number, head, kv_head, sinks, value_scales):
        """The number of row r, normalised; and the row's log-sum-exp to base 2."""
        # Where the warps put this number: lane g had chunks g, g + 8, ...
        load, chunk = number // (8 * PER_CHUNK), number // PER_CHUNK % 8
        at = 8 * (load * PER_CHUNK + number % PER_CHUNK) + chunk
        highest = MINUS_INFINITY
        if SINKS:
            highest = sinks[head] * TO_BASE_2
        for w in range(PARTS):
            highest = max(highest, shared_highest[ROWS * w + r])
        shift = highest if highest > MINUS_INFINITY else ZERO
        total, mixed = ZERO, ZERO
        for w in range(PARTS):
            weight = exp2(shared_highest[ROWS * w + r] - shift)
            total += weight * shared_total[ROWS * w + r]
            mixed += weight * shared_o[(ROWS * w + r) * STRIDE + at]
        if SINKS:
            total += exp2(sinks[head] * TO_BASE_2 - shift)
        norm = ZERO
        if total > ZERO or total != total:
            norm = ONE / total
        if QUANTIZED:
            norm = norm * value_scales[kv_head] * FACTOR
        logarithm = MINUS_INFINITY
        if total > ZERO or total != total:
            logarithm = highest + math.log2(total)
        return mixed * norm, logarithm

    @device
    def write_rows(
        out, lse, shared_o, shared_highest, shared_total, thread, seq, first_row, first_token, num_rows,
        kv_head, num_kv_heads, num_splits, split_number, sinks, value_scales,
    ):  # fmt: skip
        """A thread for each number of the output."""
        for i in range(thread, min(ROWS_PER_BLOCK, num_rows - first_row) * HEAD_SIZE, NUM_THREADS):
            r, number = i // HEAD_SIZE, i % HEAD_SIZE
            token, head = first_token + (first_row + r) // GROUP, kv_head * GROUP + (first_row + r) % GROUP
            value, logarithm = merge(
                shared_o, shared_highest, shared_total, r, number, head, kv_head, sinks, value_scales
            )
            here = token * (num_kv_heads * GROUP) + head
            if SPLIT and MIXED:
                here = (seq * MAX_SPLIT_QUERIES + token - first_token) * (num_kv_heads * GROUP) + head
            if SPLIT:
                here = here * num_splits + split_number
                out[here * HEAD_SIZE + number] = value
                if number == 0:
                    lse[here] = logarithm
            else:
                out[here * HEAD_SIZE + number] = to_out(value)
                if number == 0:
                    lse[here] = logarithm * TO_BASE_E

    return store_shared, write_rows
