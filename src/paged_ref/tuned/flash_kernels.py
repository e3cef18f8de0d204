"""The tuned kernels: attention at the speed of memory, through block tables or without them.

`attention_kernel` is a factory: a `KernelVariant` says what is fixed when the kernel is compiled (kind of numbers, head
size, group size, block size, features). Without a block size the kernel is the contiguous twin: the same lines without
the table lookup. flash_rows.py, flash_stages.py and flash_output.py have the stages, and flash_layout.py the sizes.

The work of a warp. A *row* is one query of one head. The query heads of a group read the same K and V, so a warp
takes eight rows of a group at a time, and tiles of 16 keys (8 in float32):

    scores   S [8 rows, TILE]  = Q · Kᵀ      on the tensor cores
    softmax  P from S, online, in registers: lanes 4·g to 4·g + 3 hold row g
    values   Oᵀ [head, 8 rows] += Vᵀ · Pᵀ    on the tensor cores; O stays in registers

Decode (few queries): the four warps of a CUDA block share its rows and take every fourth tile, and are merged in shared
memory at the end. A long sequence is split over several CUDA blocks, whose parts `combine_kernel` merges. Prefill (many
queries): each warp has rows of its own, and all keys that they see; the warps of a CUDA block read the same tiles at
about the same time, so all but the first find them in the L1. A mixed batch gets both kernels, and each leaves the
sequences of the other kernel alone.

Four things that are easy to miss:
* The tensor core multiplies 16 rows by 8 columns. Q · Kᵀ fills eight of the rows, so the other eight hold what
  rounding Q to 16 bits lost, and the halves of the result are added. (A Q that loses nothing fills them with its
  own other half: see `add_scores`.) P is multiplied twice: rounded, and what rounding lost. So the answer has nearly
  float32's accuracy, at 8 instructions more for each tile. (Float32 queries over float32 caches, in pairs of tf32: off
  by up to 5e-6 of the sum of |weight * value|, 4.65e-6 measured where logits spread over 60.)
* S = Q · Kᵀ, but Oᵀ = Vᵀ · Pᵀ: then the lane that computed a score holds it where the next product wants it.
* Which key or number of a head stands in which place of a fragment is free, as long as both operands agree. Here a
  lane's operands are 16 consecutive bytes of the cache, so K and V go from global memory straight to the tensor cores.
* The loads of the next K are issued when the scores are done, those of the next V after the values: they run
  while the warp computes, and need no further registers. The table is read one tile further ahead. (Rows of
  512 bytes in 16 bits are too wide for that: there a tile's V is loaded after its scores, in the place of K.)
"""

from __future__ import annotations

from functools import cache

from numba import cuda
from numba.types import float32, int32, int64, uint32

from . import flash_stages as stages
from .cuda_intrinsics import MINUS_INFINITY, ONE, TO_BASE_2, ZERO, device
from .flash_layout import Layout
from .flash_output import outputs
from .flash_rows import rows_of_block, tiles_of_warp
from .flash_variant import EVERY_LANE, NUM_THREADS, KernelVariant


def tile_loop(layout: Layout):
    """Makes `attend_tiles`, which goes through the tiles of a warp."""
    WIDE, STEP, LOOKUPS = layout.variant.wide, layout.step, layout.lookups
    K_WORDS, V_WORDS, S_SIZE, V_ROWS = layout.k_words, layout.v_words, layout.s_size, layout.v_rows
    look_up, load_keys, load_values = stages.cache_reads(layout)
    add_scores, add_values = stages.score_products(layout), stages.value_products(layout)
    softmax = stages.online_softmax(layout)

    @device
    def attend_tiles(
        o, q, q_lost, keys, values, where, table, start, tile, end, low, high, g, t, query_position,
        key_at, value_at, options,
    ):  # fmt: skip
        """Add the tiles from `tile` to before `end` to `o`. Returns the row's highest logit, and the sum of the weights
        that this lane has seen, relative to it."""
        k = cuda.local.array(K_WORDS, uint32)
        v = cuda.local.array(V_WORDS, uint32)
        blocks = cuda.local.array(LOOKUPS, uint32)
        ahead = cuda.local.array(LOOKUPS, uint32)
        for i in range(LOOKUPS):
            blocks[i], ahead[i] = uint32(0), uint32(0)
        highest = MINUS_INFINITY  # the row's four lanes hold the same
        total = ZERO
        if tile < end:
            look_up(blocks, where, table, tile, low, high, g, t)
            load_keys(k, keys, blocks, start, key_at, tile, low, high, g, t)
            if not WIDE:
                load_values(v, values, blocks, start, value_at, tile, low, high, g, t)
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
                load_values(v, values, blocks, start, value_at, tile, low, high, g, t)
                if following < end:
                    look_up(blocks, where, table, following, low, high, g, t)
            elif following < end:  # the same for all lanes
                load_keys(k, keys, blocks, start, key_at, following, low, high, g, t)
                if following + STEP < end:
                    look_up(ahead, where, table, int32(following + STEP), low, high, g, t)
            highest, total = softmax(weights, o, highest, total, s, s_other, tile, t, query_position, options)
            add_values(o, v, weights)
            if following < end:
                if WIDE:
                    load_keys(k, keys, blocks, start, key_at, following, low, high, g, t)
                else:
                    load_values(v, values, blocks, start, value_at, following, low, high, g, t)
                    for i in range(LOOKUPS):
                        blocks[i] = ahead[i]
            tile = following
        return highest, total

    return attend_tiles


@cache
def attention_kernel(variant: KernelVariant):
    """The kernel of this variant. Launch it with NUM_THREADS threads; flash.py has the grid."""
    layout = Layout(variant)
    HEAD_SIZE, GROUP, PAGED, QUANTIZED = variant.head_size, variant.group_size, layout.paged, layout.quantized
    SOFTCAP, ALIBI, FACTOR = variant.softcap, variant.alibi, float32(layout.element.factor)
    Q_WORDS, O_SIZE, SHARED_ROWS = layout.q_words, layout.o_size, layout.shared_rows
    SHARED_SIZE = layout.shared_rows * layout.stride
    rows, tiles, load_query = rows_of_block(layout), tiles_of_warp(layout), stages.query_loads(layout)
    attend_tiles = tile_loop(layout)
    store_shared, write_rows = outputs(layout)

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

        num_blocks = cuda.gridDim.x // heads
        seq, first_row, warp_row, first_token, num_rows = rows(query_start_loc, num_seqs, block, num_blocks, warp)
        if first_row >= num_rows:
            return  # all threads do
        # A token's position: causal, aligned at the end of the sequence.
        to_position = seq_lens[seq] - query_start_loc[seq + 1]
        row = warp_row + g
        token, head = first_token + row // GROUP, kv_head * GROUP + row % GROUP
        query_position = int32(token + to_position) if row < num_rows else int32(-1)  # -1 sees nothing
        low, high, tile, end = tiles(
            warp, warp_row, first_token, num_rows, to_position, window, num_splits, split_number
        )

        q = cuda.local.array(Q_WORDS, uint32)
        q_lost = cuda.local.array(Q_WORDS, uint32)  # what rounding to an operand lost
        load_query(q, q_lost, query, (token * (num_kv_heads * GROUP) + head) * HEAD_SIZE, row < num_rows, t)

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
        table, start = int64(0), int32(0)
        if PAGED:
            table = seq * where_stride
        else:
            start = int32(where[seq])
        key_at = (uint32(kv_head * key_head_stride), key_block_stride, key_slot_stride)
        value_at = (uint32(kv_head * value_head_stride), value_block_stride, value_slot_stride)

        o = cuda.local.array(O_SIZE, float32)
        for i in range(O_SIZE):
            o[i] = ZERO
        highest, total = attend_tiles(
            o, q, q_lost, keys, values, where, table, start, tile, end, low, high, g, t, query_position,
            key_at, value_at, (to_logit, cap, one_over_cap, slope, window),
        )  # fmt: skip

        shared_o = cuda.shared.array(SHARED_SIZE, float32)
        shared_highest = cuda.shared.array(SHARED_ROWS, float32)
        shared_total = cuda.shared.array(SHARED_ROWS, float32)
        store_shared(shared_o, shared_highest, shared_total, o, highest, total, warp, g, t)
        write_rows(
            out, lse, shared_o, shared_highest, shared_total, thread, seq, first_row, first_token, num_rows,
            kv_head, num_kv_heads, num_splits, split_number, sinks, value_scales,
        )  # fmt: skip

    return flash_attention
