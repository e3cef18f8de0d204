"""The stages of a tile in the tuned kernel: loads, scores, softmax, values. Device functions, made for one variant.

flash_rows.py has the stage before the tiles, flash_output.py the stage after them. What is fixed when a kernel is
compiled is written in capitals, as in flash_kernels.py. Numba inlines all stages, so that the arrays of a thread stay
in registers.
"""

from __future__ import annotations

import math

from numba import cuda
from numba.types import float32, int32, uint32

from .cuda_intrinsics import MINUS_INFINITY, ZERO, device, exp2, load16
from .flash_layout import Layout
from .flash_variant import EVERY_LANE, FROM

NO_WORDS = (uint32(0),) * 4


def query_loads(layout: Layout):
    """Makes `load_query`, which loads a lane's part of Q."""
    element, from_query, split = layout.element, FROM[layout.variant.query], layout.element.split
    CHUNKS, K_LOADS, ALL_K, PAIRS = layout.chunks, layout.k_loads, layout.all_k, layout.pairs
    PER_CHUNK, PER_WORD, EXACT = element.per_chunk, element.per_word, layout.variant.exact

    @device
    def load_query(q, q_lost, query, here, visible, t):
        """The chunks t, t + 4, ... of the lane's row as operands, and what rounding lost. `here`: where the row begins
        in `query`; rows that are not `visible` are zeros."""
        for c in range(K_LOADS):
            mine = visible and (ALL_K or 4 * c + t < CHUNKS)
            first = here + (4 * c + t) * PER_CHUNK
            for i in range(0, 2 * PAIRS, 4):
                at = 2 * PAIRS * c + i
                if EXACT:  # the numbers are operands as they lie
                    q[at], q[at + 1], q[at + 2], q[at + 3] = NO_WORDS
                    if mine:
                        chunk = uint32((first + PER_WORD * i) // (4 * PER_WORD))
                        q[at], q[at + 1], q[at + 2], q[at + 3] = load16(query, chunk, 0)
                else:
                    for j in range(4):
                        x, y = ZERO, ZERO
                        if mine:
                            number = first + PER_WORD * (i + j)
                            x, y = from_query(query[number]), from_query(query[number + PER_WORD - 1])
                        q[at + j], q_lost[at + j] = split(x, y)

    return load_query


def cache_reads(layout: Layout):
    """Makes `look_up`, `load_keys` and `load_values`, which read the block table and a lane's part of a tile."""
    PAGED, ONE_BLOCK, EIGHTS, WINDOW = layout.paged, layout.one_block, layout.eights, layout.variant.window
    TILE, CHUNKS, K_ROWS, V_ROWS = layout.tile, layout.chunks, layout.k_rows, layout.v_rows
    UNSIGNED_BLOCK_SIZE, TILES_PER_BLOCK = uint32(layout.block_size), uint32(max(1, layout.block_size // layout.tile))

    @device
    def nearest(r, first, last):
        """Key r of the tile, or the nearest that the warp may read: memory past the ends may be anything."""
        if WINDOW:
            r = max(r, first)
        return min(r, last)

    @device
    def look_up(blocks, where, table, tile, low, high, g, t):
        """Read the table for a tile. `low` and `high`: the first key of this warp, and the one past the last."""
        if PAGED and ONE_BLOCK:
            blocks[0] = uint32(where[table + uint32(tile) // TILES_PER_BLOCK])
        elif PAGED:
            for i in range(K_ROWS):
                position = nearest(int32(tile * TILE + 8 * i + (0 if EIGHTS else g)), low, int32(high - 1))
                blocks[i] = uint32(where[table + uint32(position) // UNSIGNED_BLOCK_SIZE])
            for i in range(0 if EIGHTS else V_ROWS):
                position = nearest(int32(tile * TILE + 8 * (i // 2) + 2 * t + i % 2), low, int32(high - 1))
                blocks[K_ROWS + i] = uint32(where[table + uint32(position) // UNSIGNED_BLOCK_SIZE])

    @device
    def row_of(blocks, i, start, tile, r, block_stride, slot_stride):
        """Where key r of the tile begins, in chunks of 16 bytes: `slot_of`, with the strides of the cache."""
        if PAGED and ONE_BLOCK:
            block, offset = blocks[0], uint32(uint32(tile) % TILES_PER_BLOCK * TILE + r)
        elif PAGED:
            block, offset = blocks[i], uint32(uint32(tile * TILE + r) % UNSIGNED_BLOCK_SIZE)
        else:
            block, offset = uint32(0), uint32(start + tile * TILE + r)
        return uint32(uint32(block * block_stride) + uint32(offset * slot_stride))

    def loads(num_rows, num_loads, lanes, key_of, entry_of):
        """Makes the load of num_rows keys of a tile, of which `lanes` lanes take neighbouring chunks."""
        ALL = CHUNKS % lanes == 0  # no lane is left without a chunk

        @device
        def load(words, cache, blocks, start, at, tile, low, high, g, t):
            """Fill `words`; `at`: where the KV head begins, and the strides of a block and a slot."""
            base, block_stride, slot_stride = at
            lane = t if lanes == 4 else g
            for i in range(num_rows):
                r = nearest(int32(key_of(i, g, t)), int32(low - tile * TILE), int32(high - 1 - tile * TILE))
                chunk = uint32(base + lane + row_of(blocks, entry_of(i), start, tile, r, block_stride, slot_stride))
                for c in range(num_loads):
                    to = 4 * (i * num_loads + c)
                    if ALL or lanes * c + lane < CHUNKS:
                        words[to], words[to + 1], words[to + 2], words[to + 3] = load16(cache, chunk, lanes * c)
                    else:
                        words[to], words[to + 1], words[to + 2], words[to + 3] = NO_WORDS

        return load

    key_of_k, key_of_v = device(lambda i, g, t: 8 * i + g), device(lambda i, g, t: 8 * (i // 2) + 2 * t + i % 2)
    entry_of_k, entry_of_v = device(lambda i: i), device(lambda i: i // 2 if EIGHTS else K_ROWS + i)
    load_keys = loads(K_ROWS, layout.k_loads, 4, key_of_k, entry_of_k)
    load_values = loads(V_ROWS, layout.v_loads, 8, key_of_v, entry_of_v)
    return look_up, load_keys, load_values


def score_products(layout: Layout):
    """Makes `add_scores`, which multiplies Q by a tile of K."""
    score_operand, multiply_keys = layout.element.score_operand, layout.element.multiply_keys
    S_SIZE, K_LOADS, PAIRS, EXACT = layout.s_size, layout.k_loads, layout.pairs, layout.variant.exact

    @device
    def add_product(s, i, a0, a1, a2, a3, b0, b1):
        sums = multiply_keys(a0, a1, a2, a3, b0, b1, s[i], s[i + 1], s[i + 2], s[i + 3])
        s[i], s[i + 1], s[i + 2], s[i + 3] = sums

    @device
    def add_scores(s, s_other, q, q_lost, k):
        """S += Q · Kᵀ. Columns 2t and 2t + 1 of fragment i are keys 8i + 2t and 8i + 2t + 1 of the tile.

        If Q is EXACT, rounding lost nothing, and it would be a waste to hold zeros in registers. Then rows 0 to 7
        of A are one half of a chunk of Q, and rows 8 to 15 the other. Multiplied by one half of the chunk of K
        the upper rows of the result count (in `s`), by the other half the lower ones (in `s_other`).
        """
        for i in range(0, S_SIZE, 4):
            for c in range(K_LOADS):
                for j in range(PAIRS):
                    b0, b1 = score_operand(k, i * K_LOADS + 4 * c, j)
                    at = 2 * (c * PAIRS + j)
                    if not EXACT:
                        add_product(s, i, q[at], q_lost[at], q[at + 1], q_lost[at + 1], b0, b1)
                    elif j % 2 == 0:
                        add_product(s, i, q[at], q[at + 2], q[at + 1], q[at + 3], b0, b1)
                    else:
                        add_product(s_other, i, q[at - 2], q[at], q[at - 1], q[at + 1], b0, b1)

    return add_scores


def value_products(layout: Layout):
    """Makes `add_values`, which multiplies weights by a tile of V."""
    value_operand, split, multiply_values = (
        layout.element.value_operand, layout.element.split, layout.element.multiply_values,
    )  # fmt: skip
    PER_WORD, V_LOADS, PAIRS_OUT, HALF_V = layout.per_word, layout.v_loads, layout.pairs_out, layout.v_words // 2

    @device
    def add_values(o, v, weights):
        """Oᵀ += Vᵀ · Pᵀ. The lane's weights are of the keys whose V it holds: its P is an operand as it stands."""
        p0, p0_lost = split(weights[0], weights[PER_WORD - 1])
        p1, p1_lost = split(weights[PER_WORD], weights[2 * PER_WORD - 1])
        for c in range(V_LOADS):
            row, next_row = 4 * c, 4 * ((PER_WORD - 1) * V_LOADS + c)  # the two keys of a word of P; or one, twice
            for i in range(PAIRS_OUT):
                a0 = value_operand(v, row, next_row, 2 * i)
                a1 = value_operand(v, row, next_row, 2 * i + 1)
                a2 = value_operand(v, row + HALF_V, next_row + HALF_V, 2 * i)
                a3 = value_operand(v, row + HALF_V, next_row + HALF_V, 2 * i + 1)
                at = 4 * (c * PAIRS_OUT + i)
                o[at], o[at + 1], o[at + 2], o[at + 3] = multiply_values(
                    a0, a1, a2, a3, p0, p1, p0_lost, p1_lost, o[at], o[at + 1], o[at + 2], o[at + 3]
                )

    return add_values


def online_softmax(layout: Layout):
    """Makes `softmax`, which turns the scores of a tile into weights."""
    TILE, V_ROWS, O_SIZE, EXACT = layout.tile, layout.v_rows, layout.o_size, layout.variant.exact
    WINDOW, SOFTCAP, ALIBI = layout.variant.window, layout.variant.softcap, layout.variant.alibi

    @device
    def logits(weights, highest, s, s_other, tile, t, query_position, options):
        """Fill `weights` with the lane's logits to base 2, -inf for hidden keys. Returns the highest, or `highest`."""
        to_logit, cap, one_over_cap, slope, window = options
        for i in range(V_ROWS):
            upper, lower = s[4 * (i // 2) + i % 2], s[4 * (i // 2) + i % 2 + 2]
            if EXACT:
                lower = s_other[4 * (i // 2) + i % 2 + 2]
            logit = (upper + lower) * to_logit
            if SOFTCAP:
                logit = cap * math.tanh(logit * one_over_cap)
            distance = int32(tile * TILE + 8 * (i // 2) + 2 * t + i % 2 - query_position)
            if ALIBI:
                logit += slope * float32(distance)
            visible = distance <= 0
            if WINDOW:
                visible = visible and distance > -window
            weights[i] = logit if visible else MINUS_INFINITY
            highest = max(highest, weights[i])
        return highest

    @device
    def rescale(o, total, highest, new_highest, t):
        """Scale `o` and `total` to the new highest logit. Returns `total`, and the shift of the weights."""
        shift = new_highest if new_highest > MINUS_INFINITY else ZERO  # -inf - -inf would be NaN
        if cuda.any_sync(EVERY_LANE, new_highest > highest):  # rare after the first tiles
            shrink = exp2(highest - shift)  # in the first tile: 0
            total *= shrink
            even, odd = cuda.shfl_sync(EVERY_LANE, shrink, 8 * t), cuda.shfl_sync(EVERY_LANE, shrink, 8 * t + 4)
            for i in range(0, O_SIZE, 2):
                o[i] *= even
                o[i + 1] *= odd
        return total, shift

    @device
    def softmax(weights, o, highest, total, s, s_other, tile, t, query_position, options):
        """Fill `weights`: relative to the highest logit so far, a weight is at most 1. Returns `highest`, `total`."""
        new_highest = logits(weights, highest, s, s_other, tile, t, query_position, options)
        new_highest = max(new_highest, cuda.shfl_xor_sync(EVERY_LANE, new_highest, 1))
        new_highest = max(new_highest, cuda.shfl_xor_sync(EVERY_LANE, new_highest, 2))
        total, shift = rescale(o, total, highest, new_highest, t)
        for i in range(V_ROWS):
            weights[i] = exp2(weights[i] - shift)
            total += weights[i]
        return new_highest, total

    return softmax
