"""The tuned kernels: attention at the speed of memory, through block tables or without them.

One source for all. `attention_kernel` is a factory: a `KernelVariant` says what is fixed when the kernel is compiled
(kind of numbers, head size, group size, block size, features), and each variant is compiled once. Without a
block size it is the contiguous twin: the same lines, the table lookup left out.

Who does what. A *row* is one query of one head. The query heads of a group read the same K and V, so a warp
takes eight rows of a group at a time, and tiles of TILE keys (16; 8 in float32):

    scores   S [8 rows, TILE]  = Q · Kᵀ      on the tensor cores
    softmax  P from S, online, in registers: lanes 4·g to 4·g + 3 hold row g
    values   Oᵀ [head, 8 rows] += Vᵀ · Pᵀ    on the tensor cores; O stays in registers

Decode (few queries): the four warps of a CUDA block share its rows and take every fourth tile; they are merged
in shared memory at the end. A long sequence is split over several CUDA blocks, whose parts `combine_kernel`
merges. Prefill (many queries): each warp has rows of its own, and all keys that they see; the warps of a CUDA
block read the same tiles at about the same time, so all but the first find them in the L1. A mixed batch gets
both kernels, and each leaves the other its sequences.

Four things that are easy to miss:
* The tensor core multiplies 16 rows by 8 columns. Q · Kᵀ fills eight of the rows, so the other eight hold what
  rounding Q to 16 bits lost, and the halves of the result are added. (A Q that loses nothing fills them with its
  own other half: see `add_scores`.) P is multiplied twice, rounded and what that lost. So the answer has nearly
  float32's accuracy, at 8 instructions more for each tile.
* S = Q · Kᵀ, but Oᵀ = Vᵀ · Pᵀ: then the lane that computed a score holds it where the next product wants it.
* Which key or which number of a head stands in which place of a fragment is free, as long as both operands
  agree. The order here is the one in which a lane's operands are 16 consecutive bytes of the cache. So K and V
  go from global memory straight to the tensor cores, with no way round through shared memory.
* The loads of the next K are issued when the scores are done, those of the next V after the values: they fly
  while the warp computes, and need no further registers. The table is read one tile further ahead. (Rows of
  512 bytes in 16 bits are too WIDE for that: there a tile's V is loaded after its scores, in the place of K.)
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda
from numba.types import float32, int32, int64, uint32

from .cuda_intrinsics import exp2, load16
from .flash_elements import ELEMENTS
from .flash_variant import EVERY_LANE, FROM, MAX_SPLIT_QUERIES, NUM_THREADS, NUM_WARPS, ROWS, TO, KernelVariant

device = cuda.jit(device=True, inline="always")


# ---- whose rows are these


@device
def sequence_of_token(query_start_loc, num_seqs, token):
    """The sequence of a token, by halving, unless each sequence has one token."""
    if token < num_seqs and query_start_loc[token] == token and query_start_loc[token + 1] == token + 1:
        return int64(token)
    low, high = int64(0), int64(num_seqs - 1)
    while low < high:
        middle = (low + high + 1) >> 1
        if query_start_loc[middle] <= token:
            low = middle
        else:
            high = middle - 1
    return low


@device
def first_block_of(query_start_loc, seq, group_size, rows):
    """The first CUDA block (of `rows` rows) of a sequence in a prefill, without a sum over those before it.

    Each sequence gets as many blocks as its rows fill, or one more.
    """
    return query_start_loc[seq] * group_size // rows + seq


@cache
def attention_kernel(variant: KernelVariant):
    """The kernel of this variant. Launch it with NUM_THREADS threads; see `flash.launches` for the grid."""
    element = ELEMENTS[variant.cache]
    score_operand, value_operand = element.score_operand, element.value_operand
    split, multiply_keys, multiply_values = element.split, element.multiply_keys, element.multiply_values
    from_query, to_out = FROM[variant.query], TO[variant.query]
    HEAD_SIZE, GROUP, BLOCK_SIZE = variant.head_size, variant.group_size, variant.block_size or 1
    PAGED, PREFILL, SPLIT = variant.block_size is not None, variant.prefill, variant.split
    WINDOW, SOFTCAP, ALIBI, SINKS = variant.window, variant.softcap, variant.alibi, variant.sinks
    QUANTIZED = element.bits == 8
    EXACT = variant.exact

    PER_CHUNK, PER_WORD = element.per_chunk, element.per_word  # numbers in 16 bytes; in a word of an operand
    CHUNKS = HEAD_SIZE // PER_CHUNK  # 16-byte chunks of a row of K or V
    TILE = 8 * PER_WORD
    K_ROWS, V_ROWS = PER_WORD, 2 * PER_WORD  # keys of a tile that a lane reads of K; of V
    K_LOADS = -(-CHUNKS // 4)  # loads for each K row: lanes t = 0..3 take neighbouring chunks
    V_LOADS = -(-CHUNKS // 8)  # loads for each V row: lanes g = 0..7 do
    ALL_K, ALL_V = CHUNKS % 4 == 0, CHUNKS % 8 == 0  # no lane is left without a chunk
    PAIRS = 4 if QUANTIZED else 2  # operands (pairs of words) in a chunk of K
    Q_WORDS = K_LOADS * 2 * PAIRS
    K_WORDS, V_WORDS = 4 * K_ROWS * K_LOADS, 4 * V_ROWS * V_LOADS
    HALF_V = V_WORDS // 2
    PAIRS_OUT = PER_CHUNK // 2  # a fragment of O is two numbers of each lane's chunk
    O_SIZE, S_SIZE = 4 * V_LOADS * PAIRS_OUT, 4 * K_ROWS
    STRIDE = 8 * V_LOADS * PER_CHUNK + 4  # between rows in shared memory: no two lanes of a store meet in a bank
    # Table entries that a lane needs for a tile: one if a tile lies in one block, one for every eight keys if they
    # do, else one for each of its rows.
    ONE_BLOCK, EIGHTS = BLOCK_SIZE % TILE == 0, BLOCK_SIZE % 8 == 0
    LOOKUPS = 1 if ONE_BLOCK or not PAGED else PER_WORD if EIGHTS else K_ROWS + V_ROWS
    WIDE = variant.wide
    BLOCKS_PER_ITEM, ROWS_PER_BLOCK, MIXED = variant.blocks_per_item, variant.rows_per_block, variant.mixed
    SHARED_ROWS = NUM_WARPS * ROWS
    SHARED_SIZE = SHARED_ROWS * STRIDE
    PARTS = 1 if PREFILL else NUM_WARPS  # warps that hold parts of a row
    STEP = 1 if PREFILL else NUM_WARPS  # from a warp's tile to its next
    UNSIGNED_BLOCK_SIZE, TILES_PER_BLOCK = uint32(BLOCK_SIZE), uint32(max(1, BLOCK_SIZE // TILE))
    MINUS_INFINITY, ZERO, ONE = float32(-math.inf), float32(0), float32(1)
    TO_BASE_2, TO_BASE_E, FACTOR = float32(math.log2(math.e)), float32(math.log(2)), float32(element.factor)

    @device
    def sequence_of_block(query_start_loc, num_seqs, block):
        """The sequence whose rows this CUDA block of a prefill has."""
        low, high = int64(0), int64(num_seqs - 1)
        while low < high:
            middle = (low + high + 1) >> 1
            if first_block_of(query_start_loc, middle, GROUP, ROWS_PER_BLOCK) <= block:
                low = middle
            else:
                high = middle - 1
        return low

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

    @device
    def load_keys(k, keys, blocks, start, base, tile, low, high, g, t, block_stride, slot_stride):
        """The lane's chunks of its keys, 8i + g of the tile."""
        for i in range(K_ROWS):
            r = nearest(int32(8 * i + g), int32(low - tile * TILE), int32(high - 1 - tile * TILE))
            chunk = uint32(base + t + row_of(blocks, i, start, tile, r, block_stride, slot_stride))
            for c in range(K_LOADS):
                at = 4 * (i * K_LOADS + c)
                if ALL_K or 4 * c + t < CHUNKS:
                    k[at], k[at + 1], k[at + 2], k[at + 3] = load16(keys, chunk, 4 * c)
                else:
                    k[at], k[at + 1], k[at + 2], k[at + 3] = uint32(0), uint32(0), uint32(0), uint32(0)

    @device
    def load_values(v, values, blocks, start, base, tile, low, high, g, t, block_stride, slot_stride):
        """The lane's chunks of its values, 2t, 2t + 1 (and 8 + 2t, 8 + 2t + 1) of the tile."""
        for i in range(V_ROWS):
            r = nearest(int32(8 * (i // 2) + 2 * t + i % 2), int32(low - tile * TILE), int32(high - 1 - tile * TILE))
            entry = i // 2 if EIGHTS else K_ROWS + i
            chunk = uint32(base + g + row_of(blocks, entry, start, tile, r, block_stride, slot_stride))
            for c in range(V_LOADS):
                at = 4 * (i * V_LOADS + c)
                if ALL_V or 8 * c + g < CHUNKS:
                    v[at], v[at + 1], v[at + 2], v[at + 3] = load16(values, chunk, 8 * c)
                else:
                    v[at], v[at + 1], v[at + 2], v[at + 3] = uint32(0), uint32(0), uint32(0), uint32(0)

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
                        sums = multiply_keys(
                            q[at], q_lost[at], q[at + 1], q_lost[at + 1], b0, b1, s[i], s[i + 1], s[i + 2], s[i + 3]
                        )
                        s[i], s[i + 1], s[i + 2], s[i + 3] = sums
                    elif j % 2 == 0:
                        sums = multiply_keys(
                            q[at], q[at + 2], q[at + 1], q[at + 3], b0, b1, s[i], s[i + 1], s[i + 2], s[i + 3]
                        )
                        s[i], s[i + 1], s[i + 2], s[i + 3] = sums
                    else:
                        sums = multiply_keys(
                            q[at - 2], q[at], q[at - 1], q[at + 1], b0, b1,
                            s_other[i], s_other[i + 1], s_other[i + 2], s_other[i + 3],
                        )  # fmt: skip
                        s_other[i], s_other[i + 1], s_other[i + 2], s_other[i + 3] = sums

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

    @cuda.jit(launch_bounds=(NUM_THREADS, variant.blocks_per_multiprocessor))
    def flash_attention(
        out, lse, query, keys, values,
        where, where_stride,
        seq_lens, query_start_loc, num_seqs, num_kv_heads,
        key_block_stride, key_slot_stride, key_head_stride,
        value_block_stride, value_slot_stride, value_head_stride,
        scale, window, softcap, alibi_slopes, sinks, key_scales, value_scales,
    ):  # fmt: skip
        """All arrays are flat.

        out    [num_tokens, num_heads, head_size], or parts [num_items, num_heads, num_splits, head_size] float32
               an item is a token; mixed: place MAX_SPLIT_QUERIES * seq + i is for query i of sequence seq
        lse    [num_tokens, num_heads], or [num_items, num_heads, num_splits] to base 2
        query  [num_tokens, num_heads, head_size]; words, from a multiple of 16 bytes, if the variant is `exact`
        keys, values       words; their strides are chunks of 16 bytes
        where              block table [num_seqs, where_stride]; without blocks: starts [num_seqs]
        """
        thread = cuda.threadIdx.x
        warp = int32(cuda.shfl_sync(EVERY_LANE, thread >> 5, 0))  # so that the compiler sees: the same for all lanes
        g, t = int32(thread >> 2 & 7), int32(thread & 3)
        block_number, heads = uint32(cuda.blockIdx.x), uint32(num_kv_heads)
        block, kv_head = int32(block_number // heads), int32(block_number % heads)
        num_splits, split_number = cuda.gridDim.y, cuda.blockIdx.y

        # Rows of this CUDA block: row r is head r % GROUP of the group, of query `first_token + r // GROUP`.
        if PREFILL:
            block = int32(cuda.gridDim.x // heads - 1 - block)  # the last queries, which see most, begin first
            seq = sequence_of_block(query_start_loc, num_seqs, block)
            first_row = (block - first_block_of(query_start_loc, seq, GROUP, ROWS_PER_BLOCK)) * ROWS_PER_BLOCK
            warp_row = first_row + ROWS * warp
        else:
            seq = int64(block // BLOCKS_PER_ITEM)
            if not MIXED:
                seq = sequence_of_token(query_start_loc, num_seqs, seq)
            first_row = block % BLOCKS_PER_ITEM * ROWS
            warp_row = first_row
        first_token, num_queries = int32(query_start_loc[seq]), query_start_loc[seq + 1] - query_start_loc[seq]
        if MIXED and (num_queries <= MAX_SPLIT_QUERIES) == PREFILL:
            return  # all threads do: the other kernel has this sequence
        if not PREFILL and not MIXED:  # a token for each CUDA block
            first_token, num_queries = int32(block // BLOCKS_PER_ITEM), 1
        num_rows = num_queries * GROUP
        if first_row >= num_rows:
            return
        # A token's position: causal, aligned at the end of the sequence.
        to_position = seq_lens[seq] - query_start_loc[seq + 1]
        row = warp_row + g
        token, head = first_token + row // GROUP, kv_head * GROUP + row % GROUP
        query_position = int32(token + to_position) if row < num_rows else int32(-1)  # -1 sees nothing

        # Keys that some row of this warp sees, and the tiles that hold them.
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

        # The lane's part of Q: of its row g, the chunks t, t + 4, ... as operands.
        q = cuda.local.array(Q_WORDS, uint32)
        q_lost = cuda.local.array(Q_WORDS, uint32)  # what rounding to an operand lost
        here = (token * (num_kv_heads * GROUP) + head) * HEAD_SIZE
        for c in range(K_LOADS):
            mine = row < num_rows and (ALL_K or 4 * c + t < CHUNKS)
            first = here + (4 * c + t) * PER_CHUNK
            for i in range(0, 2 * PAIRS, 4):
                at = 2 * PAIRS * c + i
                if EXACT:  # the numbers are operands as they lie
                    q[at], q[at + 1], q[at + 2], q[at + 3] = uint32(0), uint32(0), uint32(0), uint32(0)
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

        to_logit = scale * TO_BASE_2  # from a score to a logit to base 2
        if QUANTIZED:
            to_logit = to_logit * key_scales[kv_head] * FACTOR
        cap, one_over_cap = ZERO, ZERO
        if SOFTCAP:
            cap = softcap * TO_BASE_2
            one_over_cap = ONE / cap
        slope = ZERO
        if ALIBI and row < num_rows:
            slope = alibi_slopes[head] * TO_BASE_2

        k = cuda.local.array(K_WORDS, uint32)
        v = cuda.local.array(V_WORDS, uint32)
        blocks = cuda.local.array(LOOKUPS, uint32)
        ahead = cuda.local.array(LOOKUPS, uint32)
        for i in range(LOOKUPS):
            blocks[i], ahead[i] = uint32(0), uint32(0)
        table, start = int64(0), int32(0)
        if PAGED:
            table = seq * where_stride
        else:
            start = int32(where[seq])
        key_base, value_base = uint32(kv_head * key_head_stride), uint32(kv_head * value_head_stride)
        o = cuda.local.array(O_SIZE, float32)
        for i in range(O_SIZE):
            o[i] = ZERO
        highest = MINUS_INFINITY  # the row's largest logit so far; its four lanes hold the same
        total = ZERO  # of the weights that this lane has seen, relative to `highest`

        if tile < end:
            look_up(blocks, where, table, tile, low, high, g, t)
            load_keys(k, keys, blocks, start, key_base, tile, low, high, g, t, key_block_stride, key_slot_stride)
            if not WIDE:
                load_values(
                    v, values, blocks, start, value_base, tile, low, high, g, t, value_block_stride, value_slot_stride
                )
                if tile + STEP < end:
                    look_up(blocks, where, table, int32(tile + STEP), low, high, g, t)
        s = cuda.local.array(S_SIZE, float32)
        s_other = cuda.local.array(S_SIZE, float32)
        weights = cuda.local.array(V_ROWS, float32)
        while tile < end:
            for i in range(S_SIZE):
                s[i], s_other[i] = ZERO, ZERO
            add_scores(s, s_other, q, q_lost, k)
            following = int32(tile + STEP)
            if WIDE:
                load_values(
                    v, values, blocks, start, value_base, tile, low, high, g, t, value_block_stride, value_slot_stride
                )
                if following < end:
                    look_up(blocks, where, table, following, low, high, g, t)
            elif following < end:  # the same for all lanes
                load_keys(
                    k, keys, blocks, start, key_base, following, low, high, g, t, key_block_stride, key_slot_stride
                )
                if following + STEP < end:
                    look_up(ahead, where, table, int32(following + STEP), low, high, g, t)

            # Softmax, to base 2. Relative to the largest logit so far, a weight is at most 1.
            new_highest = highest
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
                new_highest = max(new_highest, weights[i])
            new_highest = max(new_highest, cuda.shfl_xor_sync(EVERY_LANE, new_highest, 1))
            new_highest = max(new_highest, cuda.shfl_xor_sync(EVERY_LANE, new_highest, 2))
            shift = new_highest if new_highest > MINUS_INFINITY else ZERO  # -inf - -inf would be NaN
            if cuda.any_sync(EVERY_LANE, new_highest > highest):  # rare after the first tiles
                shrink = exp2(highest - shift)  # what came before, relative to the new maximum; first: 0
                total *= shrink
                even, odd = cuda.shfl_sync(EVERY_LANE, shrink, 8 * t), cuda.shfl_sync(EVERY_LANE, shrink, 8 * t + 4)
                for i in range(0, O_SIZE, 2):
                    o[i] *= even
                    o[i + 1] *= odd
                highest = new_highest
            for i in range(V_ROWS):
                weights[i] = exp2(weights[i] - shift)
                total += weights[i]

            add_values(o, v, weights)
            if following < end:
                if WIDE:
                    load_keys(
                        k, keys, blocks, start, key_base, following, low, high, g, t, key_block_stride, key_slot_stride
                    )
                else:
                    load_values(
                        v, values, blocks, start, value_base, following, low, high, g, t,
                        value_block_stride, value_slot_stride,
                    )  # fmt: skip
                    for i in range(LOOKUPS):
                        blocks[i] = ahead[i]
            tile = following

        # What each warp has, side by side in shared memory: row `8 * warp + g`.
        total += cuda.shfl_xor_sync(EVERY_LANE, total, 1)
        total += cuda.shfl_xor_sync(EVERY_LANE, total, 2)
        shared_o = cuda.shared.array(SHARED_SIZE, float32)
        shared_highest = cuda.shared.array(SHARED_ROWS, float32)
        shared_total = cuda.shared.array(SHARED_ROWS, float32)
        for i in range(O_SIZE // 2):  # number i of a chunk of rows 2t and 2t + 1
            shared_o[(ROWS * warp + 2 * t) * STRIDE + 8 * i + g] = o[2 * i]
            shared_o[(ROWS * warp + 2 * t + 1) * STRIDE + 8 * i + g] = o[2 * i + 1]
        if t == 0:
            shared_highest[ROWS * warp + g] = highest
            shared_total[ROWS * warp + g] = total
        cuda.syncthreads()

        # Merge, normalise, write: a thread for each number of the output.
        for i in range(thread, min(ROWS_PER_BLOCK, num_rows - first_row) * HEAD_SIZE, NUM_THREADS):
            r, number = i // HEAD_SIZE, i % HEAD_SIZE
            token, head = first_token + (first_row + r) // GROUP, kv_head * GROUP + (first_row + r) % GROUP
            # Where the warps put this number: lane g had chunks g, g + 8, ...
            load, chunk = number // (8 * PER_CHUNK), number // PER_CHUNK % 8
            at = 8 * (load * PER_CHUNK + number % PER_CHUNK) + chunk
            highest = MINUS_INFINITY
            if SINKS and not SPLIT:
                highest = sinks[head] * TO_BASE_2
            for w in range(PARTS):
                highest = max(highest, shared_highest[ROWS * w + r])
            shift = highest if highest > MINUS_INFINITY else ZERO
            total, mixed = ZERO, ZERO
            for w in range(PARTS):
                weight = exp2(shared_highest[ROWS * w + r] - shift)
                total += weight * shared_total[ROWS * w + r]
                mixed += weight * shared_o[(ROWS * w + r) * STRIDE + at]
            if SINKS and not SPLIT:
                total += exp2(sinks[head] * TO_BASE_2 - shift)
            norm = ZERO
            if total > ZERO or total != total:
                norm = ONE / total
            if QUANTIZED:
                norm = norm * value_scales[kv_head] * FACTOR
            here = token * (num_kv_heads * GROUP) + head
            if SPLIT and MIXED:
                here = (seq * MAX_SPLIT_QUERIES + token - first_token) * (num_kv_heads * GROUP) + head
            logarithm = MINUS_INFINITY
            if total > ZERO or total != total:
                logarithm = highest + math.log2(total)
            if SPLIT:
                here = here * num_splits + split_number
                out[here * HEAD_SIZE + number] = mixed * norm
                if number == 0:
                    lse[here] = logarithm
            else:
                out[here * HEAD_SIZE + number] = to_out(mixed * norm)
                if number == 0:
                    lse[here] = logarithm * TO_BASE_E

    return flash_attention
