"""The stages of the tuned kernel: device functions, which the functions of this file make for one variant.

What is fixed when a kernel is compiled is written in capitals, as in flash_kernels.py. Numba inlines all stages, so
that the arrays of a thread stay in registers.
"""

from __future__ import annotations

import math

from numba import cuda
from numba.types import float32, int32, int64, uint32

from .cuda_intrinsics import device, exp2, load16
from .flash_layout import Layout
from .flash_variant import EVERY_LANE, FROM, MAX_SPLIT_QUERIES, NUM_THREADS, ROWS, TO

MINUS_INFINITY, ZERO, ONE = float32(-math.inf), float32(0), float32(1)
TO_BASE_2, TO_BASE_E = float32(math.log2(math.e)), float32(math.log(2))
NO_WORDS = (uint32(0),) * 4


# ---- the rows of a CUDA block


def last_sequence(first_of):
    """Makes `search`: by halving, the last sequence whose `first_of(query_start_loc, seq)` is at most `number`."""

    @device
    def search(query_start_loc, num_seqs, number):
        low, high = int64(0), int64(num_seqs - 1)
        while low < high:
            middle = (low + high + 1) >> 1
            if first_of(query_start_loc, middle) <= number:
                low = middle
            else:
                high = middle - 1
        return low

    return search


@device
def first_token_of(query_start_loc, seq):
    return query_start_loc[seq]


search_token = last_sequence(first_token_of)


@device
def sequence_of_token(query_start_loc, num_seqs, token):
    """The sequence of a token: a search, unless each sequence has one token."""
    if token < num_seqs and query_start_loc[token] == token and query_start_loc[token + 1] == token + 1:
        return int64(token)
    return search_token(query_start_loc, num_seqs, token)


def rows_of_block(layout: Layout):
    """Makes `rows`, which finds the rows of a CUDA block."""
    GROUP, PREFILL, MIXED = layout.variant.group_size, layout.variant.prefill, layout.variant.mixed
    BLOCKS_PER_ITEM, ROWS_PER_BLOCK = layout.variant.blocks_per_item, layout.variant.rows_per_block

    @device
    def first_block_of(query_start_loc, seq):
        """The first CUDA block of a sequence in a prefill, without a sum over those before it: each sequence gets as
        many blocks as its rows fill, or one more."""
        return query_start_loc[seq] * GROUP // ROWS_PER_BLOCK + seq

    sequence_of_block = last_sequence(first_block_of)

    @device
    def rows(query_start_loc, num_seqs, block, num_blocks, warp):
        """(sequence, first row of the CUDA block, first row of the warp, first token, number of rows).

        Row r is head r % GROUP of the group, of query `first_token + r // GROUP`. No rows: another kernel has the
        sequence.
        """
        if PREFILL:
            block = int32(num_blocks - 1 - block)  # the last queries, which see most, begin first
            seq = sequence_of_block(query_start_loc, num_seqs, block)
            first_row = (block - first_block_of(query_start_loc, seq)) * ROWS_PER_BLOCK
            warp_row = first_row + ROWS * warp
        else:
            seq = int64(block // BLOCKS_PER_ITEM)
            if not MIXED:
                seq = sequence_of_token(query_start_loc, num_seqs, seq)
            first_row = block % BLOCKS_PER_ITEM * ROWS
            warp_row = first_row
        first_token, num_queries = int32(query_start_loc[seq]), query_start_loc[seq + 1] - query_start_loc[seq]
        if MIXED and (num_queries <= MAX_SPLIT_QUERIES) == PREFILL:
            num_queries = 0
        if not PREFILL and not MIXED:  # a token for each CUDA block
            first_token, num_queries = int32(block // BLOCKS_PER_ITEM), 1
        return seq, first_row, warp_row, first_token, num_queries * GROUP

    return rows


def tiles_of_warp(layout: Layout):
    """Makes `tiles`, which finds the keys that some row of a warp sees, and the tiles that hold these keys."""
    GROUP, TILE, WINDOW = layout.variant.group_size, layout.tile, layout.variant.window
    PREFILL, SPLIT = layout.variant.prefill, layout.variant.split

    @device
    def tiles(warp, warp_row, first_token, num_rows, to_position, window, num_splits, split_number):
        """(first key, key past the last, first tile of this warp, tile past the last)."""
        high = int32(first_token + (min(warp_row + ROWS, num_rows) - 1) // GROUP + to_position + 1)
        low = int32(0)
        if WINDOW:
            low = int32(max(0, first_token + warp_row // GROUP + to_position - window + 1))
        tile, end = int32(low // TILE), int32((high + TILE - 1) // TILE)
        if PREFILL:
            if warp_row >= num_rows:
                end = tile
        else:
            if SPLIT:
                part = int32(uint32(max(0, end - tile + num_splits - 1)) // uint32(num_splits))
                tile = int32(tile + part * split_number)
                end = int32(min(end, tile + part))
            tile = int32(tile + warp)
        return low, high, tile, end

    return tiles


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
