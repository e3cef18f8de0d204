# mypy: ignore-errors
"""The loop of the backend `cpu-simd`, compiled by Numba. Its order, from the outside in, and why:

    item   a few queries of one sequence, with the keys that they may see. Threads share the items.
     tile    16 keys. Their slots are looked up once, and this is all that paging costs.
      head     one KV head, so that a tile's K and V rows stay in the cache while every row uses them
       rows      all query heads of its group, for all queries of the item: each K row is read once for
                 all of them. Four rows by four keys at a time is what fits in the vector registers.

The softmax is online, one step for each tile (Milakov and Gimelshein 2018), so scores are kept for one tile only.
While a tile is computed, the next one is prefetched: rows of a tile lie a token apart, which the hardware's own
prefetcher does not follow (without this, decoding takes twice as long).

Arrays are flat and indices are computed in the code, because the compiler makes vectors of that form: a slice in
Numba costs a reference count, and rows of a 2-D array cost a test for negative indices.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 16  # keys: one 512-bit vector of scores
PART = 512  # keys of an item whose sequence has no other queries: a long sequence feeds several threads
FLOAT, LINE = np.float32, 16  # a cache line is 16 floats
# Sums may be reordered and fused. The flags that assume "no NaN, no infinity" stay off: -inf means hidden.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@intrinsic
def to_float(typingctx, number):
    """float32 from what a cache holds: float32, float16 as uint16, bfloat16 as int16, int8, or float8 as uint8.
    One to six instructions for a whole vector."""

    def build(context, builder, signature, arguments):
        (bits,) = arguments
        f32, i32, half, i16 = ir.FloatType(), ir.IntType(32), ir.HalfType(), ir.IntType(16)
        if number == types.float32:
            return bits
        if number == types.uint16:
            return builder.fpext(builder.bitcast(bits, half), f32)
        if number == types.int16:
            return builder.bitcast(builder.shl(builder.zext(bits, i32), i32(16)), f32)
        if number == types.int8:
            return builder.sitofp(bits, f32)
        wide = builder.zext(bits, i16)  # as in formats.from_float8
        size = builder.and_(wide, i16(0x7F))
        sign = builder.shl(builder.and_(wide, i16(0x80)), i16(8))
        small = builder.fpext(builder.bitcast(builder.or_(sign, builder.shl(size, i16(7))), half), f32)
        is_nan = builder.icmp_unsigned("==", size, i16(0x7F))
        return builder.select(is_nan, f32(math.nan), builder.fmul(small, f32(256.0)))

    return types.float32(number), build


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index], into L2, without waiting for it."""

    def build(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]), "llvm.prefetch.p0"
        )
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [address, i32(0), i32(2), i32(1)])  # read, L2, data
        return context.get_dummy_value()

    return types.void(array, types.int64), build


@njit(fastmath=FAST, forceinline=True)
def exp(x):
    """e**x for x <= 0 to float32's precision: 2**n * 2**f, the second by its series. math.exp would be a call for
    each number; the compiler makes vectors of 16 numbers of this."""
    power = x * FLOAT(1.4426950408889634)
    n = np.floor(power + FLOAT(0.5))
    f = power - n  # -0.5 to 0.5
    y = FLOAT(1.5403530e-4)
    y = y * f + FLOAT(1.3333558e-3)
    y = y * f + FLOAT(9.6181291e-3)
    y = y * f + FLOAT(5.5504109e-2)
    y = y * f + FLOAT(2.4022651e-1)
    y = y * f + FLOAT(6.9314718e-1)
    y = y * f + FLOAT(1.0)
    if x < FLOAT(-87.0):  # below float32's normal numbers, -inf included
        return FLOAT(0.0)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(FLOAT)


@njit(forceinline=True)
def unsigned(index):
    """An index that is not negative. Numba lets a signed index count from the end, and the test for that hides from
    the compiler that a[i + d] for d = 0, 1, 2... is one vector."""
    return np.uint64(index)


# One piece of work: `count` queries of sequence `s` from row `query` on, the first at `position` in its sequence,
# over the keys from `begin` to before `end`. Where a query's keys are split, this is part `part` of `parts`, and
# its result goes to the rows from `to` on of the partial results; else to the queries' own rows.
FIELDS = ("s", "query", "count", "position", "begin", "end", "part", "parts", "to")
ITEM = np.dtype([(name, np.int64) for name in FIELDS])


@njit(cache=True, nogil=True)
def plan(seq_lens, query_start_loc, window, queries):
    """The items, the number of rows of partial results, and the query-key products to compute."""
    found, split_rows, products = 0, 0, 0
    items = np.empty(64, ITEM)
    for s in range(len(seq_lens)):
        query_len = query_start_loc[s + 1] - query_start_loc[s]
        for first in range(0, query_len, queries):
            count = min(queries, query_len - first)
            position = seq_lens[s] - query_len + first
            begin, end = max(0, position - window + 1), max(0, position + count)
            parts = max(1, -(-(end - begin) // PART)) if query_len <= queries else 1
            for part in range(parts):
                if found == len(items):
                    items = np.concatenate((items, np.empty(found, ITEM)))
                item = items[found]
                item.s, item.query, item.count, item.position = s, query_start_loc[s] + first, count, position
                item.begin = begin + part * PART
                item.end = min(end, item.begin + PART) if parts > 1 else end
                item.part, item.parts, item.to = part, parts, item.query
                if parts > 1:
                    item.to = split_rows
                    split_rows += count
                products += count * max(0, item.end - item.begin)
                found += 1
    return items[:found], split_rows, products


@njit(fastmath=FAST, forceinline=True)
def slots(at, table, s, first, last, block_size, strides):
    """Fill `at [TILE]` with the places where the rows of the tile at key `first` begin: slot_of, times the strides.
    Past the end, the last key is repeated: a short tile then needs no loops of its own, and reads only its keys."""
    block, offset = first // block_size, first % block_size
    for t in range(TILE):
        if first + t < last:
            at[t] = table[s, block] * strides[0] + offset * strides[1]
            offset += 1
            if offset == block_size:
                block, offset = block + 1, 0
        else:
            at[t] = at[t - 1]


@njit(fastmath=FAST, forceinline=True)
def prefetch_tile(cache, at, strides, first, num_kv_heads, width):
    """Prefetch four head rows of the next tile, strictly in the order in which they lie in memory: any other order was
    slower, up to twice. More rows in one call were slower, too: the processor drops requests beyond its capacity."""
    for j in range(first, first + 4):
        row = at[j // num_kv_heads] + j % num_kv_heads * strides[2]
        for d in range(0, width, LINE):
            prefetch(cache, row + d)


@njit(fastmath=FAST, forceinline=True)
def unpack(rows, cache, at, offset, step, head_size):
    """Copy one head of a tile to rows [TILE, head_size] of float32, from any format and any stride."""
    for t in range(TILE):
        source, target = at[t] + offset, t * head_size
        if step == 1:  # a loop of its own, of which the compiler makes vectors
            for d in range(head_size):
                rows[unsigned(target + d)] = to_float(cache[unsigned(source + d)])
        else:
            for d in range(head_size):
                rows[unsigned(target + d)] = to_float(cache[unsigned(source + d * step)])


@njit(fastmath=FAST, forceinline=True)
def dot_four_rows(scores, r, t, query, q, keys, k0, k1, k2, k3, size):
    """scores[r:r+4, t:t+4] = four query rows, from `q` on, times the key rows at k0 to k3."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = FLOAT(0.0)
    for d in range(size):
        qa, qb = query[unsigned(q + d)], query[unsigned(q + size + d)]
        qc, qd = query[unsigned(q + 2 * size + d)], query[unsigned(q + 3 * size + d)]
        x0, x1, x2, x3 = keys[unsigned(k0 + d)], keys[unsigned(k1 + d)], keys[unsigned(k2 + d)], keys[unsigned(k3 + d)]
        a0, a1, a2, a3 = a0 + qa * x0, a1 + qa * x1, a2 + qa * x2, a3 + qa * x3
        b0, b1, b2, b3 = b0 + qb * x0, b1 + qb * x1, b2 + qb * x2, b3 + qb * x3
        c0, c1, c2, c3 = c0 + qc * x0, c1 + qc * x1, c2 + qc * x2, c3 + qc * x3
        d0, d1, d2, d3 = d0 + qd * x0, d1 + qd * x1, d2 + qd * x2, d3 + qd * x3
    i = r * TILE + t
    scores[unsigned(i)], scores[unsigned(i + 1)], scores[unsigned(i + 2)], scores[unsigned(i + 3)] = a0, a1, a2, a3
    i += TILE
    scores[unsigned(i)], scores[unsigned(i + 1)], scores[unsigned(i + 2)], scores[unsigned(i + 3)] = b0, b1, b2, b3
    i += TILE
    scores[unsigned(i)], scores[unsigned(i + 1)], scores[unsigned(i + 2)], scores[unsigned(i + 3)] = c0, c1, c2, c3
    i += TILE
    scores[unsigned(i)], scores[unsigned(i + 1)], scores[unsigned(i + 2)], scores[unsigned(i + 3)] = d0, d1, d2, d3


@njit(fastmath=FAST, forceinline=True)
def dot_one_row(scores, t, query, q, keys, k0, k1, k2, k3, size):
    """scores[0, t:t+4] where only one row exists: decoding without groups. Four rows would be four times the work."""
    a0 = a1 = a2 = a3 = FLOAT(0.0)
    for d in range(size):
        qa = query[unsigned(q + d)]
        a0, a1 = a0 + qa * keys[unsigned(k0 + d)], a1 + qa * keys[unsigned(k1 + d)]
        a2, a3 = a2 + qa * keys[unsigned(k2 + d)], a3 + qa * keys[unsigned(k3 + d)]
    scores[unsigned(t)], scores[unsigned(t + 1)], scores[unsigned(t + 2)], scores[unsigned(t + 3)] = a0, a1, a2, a3


@njit(fastmath=FAST, forceinline=True)
def add_values_two_rows(mixed, m, weights, r, t, values, v0, v1, v2, v3, size):
    """Two rows of `mixed`, from `m` on, += weights[r:r+2, t:t+4] times the value rows at v0 to v3."""
    i, j, n = r * TILE + t, (r + 1) * TILE + t, m + size
    a0, a1, a2, a3 = weights[unsigned(i)], weights[unsigned(i + 1)], weights[unsigned(i + 2)], weights[unsigned(i + 3)]
    b0, b1, b2, b3 = weights[unsigned(j)], weights[unsigned(j + 1)], weights[unsigned(j + 2)], weights[unsigned(j + 3)]
    for d in range(size):
        x0, x1 = values[unsigned(v0 + d)], values[unsigned(v1 + d)]
        x2, x3 = values[unsigned(v2 + d)], values[unsigned(v3 + d)]
        a = mixed[unsigned(m + d)] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        b = mixed[unsigned(n + d)] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        mixed[unsigned(m + d)] = a
        mixed[unsigned(n + d)] = b


@njit(fastmath=FAST, forceinline=True)
def add_values_one_row(mixed, m, weights, t, values, v0, v1, v2, v3, size):
    """The same for the one row of `mixed` at `m`."""
    a0, a1, a2, a3 = weights[unsigned(t)], weights[unsigned(t + 1)], weights[unsigned(t + 2)], weights[unsigned(t + 3)]
    for d in range(size):
        x0, x1 = values[unsigned(v0 + d)], values[unsigned(v1 + d)]
        x2, x3 = values[unsigned(v2 + d)], values[unsigned(v3 + d)]
        mixed[unsigned(m + d)] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3


@njit(fastmath=FAST, forceinline=True)
def adjust(scores, r, first, position, end, window, softcap, slope):
    """From products to scores: softcap, ALiBi, and -inf for the keys of the tile at `first` that row r, at
    `position`, does not see."""
    if softcap > 0:
        for t in range(TILE):
            scores[r * TILE + t] = softcap * math.tanh(scores[r * TILE + t] / softcap)
    last, earliest = min(position, end - 1) - first, max(position - window, -1) - first
    if slope == 0 and last >= TILE - 1 and earliest < 0:
        return  # the common case: the whole tile is visible, and nothing changes
    last32, earliest32, before = np.int32(last), np.int32(earliest), np.int32(first - position)
    for t in range(TILE):
        i, key = unsigned(r * TILE + t), np.int32(t)
        score = scores[i] + slope * FLOAT(key + before)
        if key > last32:
            score = FLOAT(-np.inf)
        if key <= earliest32:
            score = FLOAT(-np.inf)
        scores[i] = score


@njit(forceinline=True)
def row_max(scores, r, half):
    """The highest score of row r, by halves: a running maximum is a chain of 16 steps, which no compiler may reorder
    because NaN counts. `half [TILE // 2]` is scratch."""
    for t in range(TILE // 2):
        half[unsigned(t)] = max(scores[unsigned(r * TILE + t)], scores[unsigned(r * TILE + t + TILE // 2)])
    for t in range(TILE // 4):
        half[unsigned(t)] = max(half[unsigned(t)], half[unsigned(t + TILE // 4)])
    return max(max(half[0], half[1]), max(half[2], half[3]))


@njit(fastmath=FAST, forceinline=True)
def exp_weights(weights, r, shift):
    """Replace the scores of row r by weights, e**(score - shift), and return the sum of the weights."""
    total = FLOAT(0.0)
    for t in range(TILE):
        weight = exp(weights[unsigned(r * TILE + t)] - shift)
        weights[unsigned(r * TILE + t)] = weight
        total += weight
    return total


@njit(fastmath=FAST, forceinline=True)
def attend(item, query, caches, floats, in_place, strides, table, sizes, options, out, lse):
    """Compute one item. A row is a (query, head) pair of one KV head. Rows come in fours; the rows past the last pair
    are queries of zeros, and their results are never read.

    query [num_tokens * num_heads * head_size], scaled. caches: the flat K and V; floats: the same two arrays where
    they are float32 and can be read in place, else empty. The other names are those of cpu_simd.attend.
    """
    keys, values = caches
    key_strides, value_strides = strides
    block_size, num_kv_heads, group_size, size = sizes
    window, softcap, slopes, sinks = options
    num_heads, pairs = num_kv_heads * group_size, item.count * group_size
    rows = -(-pairs // 4) * 4 if pairs > 1 else 1
    q = np.zeros(num_kv_heads * rows * size, FLOAT)  # [num_kv_heads, rows, head_size], and `mixed` too
    mixed = np.zeros(num_kv_heads * rows * size, FLOAT)
    highest, total = np.zeros(num_kv_heads * rows, FLOAT), np.zeros(num_kv_heads * rows, FLOAT)
    weights = np.zeros(rows * TILE, FLOAT)  # [rows, TILE], scores at first
    half = np.empty(TILE // 2, FLOAT)
    for head in range(num_kv_heads):
        for r in range(pairs):
            row, q_head = head * rows + r, head * group_size + r % group_size
            source = ((item.query + r // group_size) * num_heads + q_head) * size
            for d in range(size):
                q[unsigned(row * size + d)] = query[unsigned(source + d)]
            # The sink is a key without a value, seen before all others.
            highest[row] = sinks[q_head] if item.part == 0 else -np.inf
            total[row] = 1.0 if highest[row] > -np.inf else 0.0

    key_at, value_at = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    next_key_at, next_value_at = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    in_tile = np.arange(TILE) * size  # where the rows of an unpacked tile begin
    key_copy, value_copy = np.empty(TILE * size, FLOAT), np.empty(TILE * size, FLOAT)
    key_rows, value_rows = floats if in_place else (key_copy, value_copy)
    if item.begin < item.end:
        slots(next_key_at, table, item.s, item.begin, item.end, block_size, key_strides)
        slots(next_value_at, table, item.s, item.begin, item.end, block_size, value_strides)
    for first in range(item.begin, item.end, TILE):
        key_at, next_key_at = next_key_at, key_at
        value_at, next_value_at = next_value_at, value_at
        if first + TILE < item.end:
            slots(next_key_at, table, item.s, first + TILE, item.end, block_size, key_strides)
            slots(next_value_at, table, item.s, first + TILE, item.end, block_size, value_strides)
        more = first + TILE < item.end
        for head in range(num_kv_heads):
            k, v, base = key_at, value_at, head * rows
            k_head, v_head = head * key_strides[2], head * value_strides[2]
            if not in_place:
                unpack(key_copy, keys, key_at, k_head, key_strides[3], size)
                unpack(value_copy, values, value_at, v_head, value_strides[3], size)
                k, v, k_head, v_head = in_tile, in_tile, 0, 0
            for t in range(0, TILE, 4):
                if more:
                    prefetch_tile(keys, next_key_at, key_strides, head * TILE + t, num_kv_heads, size)
                k0, k1, k2, k3 = k[t] + k_head, k[t + 1] + k_head, k[t + 2] + k_head, k[t + 3] + k_head
                if pairs == 1:
                    dot_one_row(weights, t, q, base * size, key_rows, k0, k1, k2, k3, size)
                for r in range(0, rows - 3, 4):
                    dot_four_rows(weights, r, t, q, (base + r) * size, key_rows, k0, k1, k2, k3, size)
            for r in range(pairs):
                row, position = base + r, item.position + r // group_size
                slope = slopes[head * group_size + r % group_size]
                adjust(weights, r, first, position, item.end, window, softcap, slope)
                top = max(highest[row], row_max(weights, r, half))
                if top > highest[row]:  # what was summed before shrinks to the new scale
                    shrink = exp(highest[row] - top)
                    highest[row] = top
                    total[row] *= shrink
                    for d in range(size):
                        mixed[unsigned(row * size + d)] *= shrink
                # While no key was seen, top is -inf, and -inf - -inf would be NaN.
                total[row] += exp_weights(weights, r, top if top > -np.inf else FLOAT(0.0))
            for t in range(0, TILE, 4):
                if more:
                    prefetch_tile(values, next_value_at, value_strides, head * TILE + t, num_kv_heads, size)
                v0, v1, v2, v3 = v[t] + v_head, v[t + 1] + v_head, v[t + 2] + v_head, v[t + 3] + v_head
                if pairs == 1:
                    add_values_one_row(mixed, base * size, weights, t, value_rows, v0, v1, v2, v3, size)
                for r in range(0, rows - 1, 2):
                    add_values_two_rows(mixed, (base + r) * size, weights, r, t, value_rows, v0, v1, v2, v3, size)

    for head in range(num_kv_heads):
        for r in range(pairs):
            row = head * rows + r
            target = (item.to + r // group_size) * num_heads + head * group_size + r % group_size
            seen = total[row] != 0  # NaN counts as seen: it must show in the output
            for d in range(size):
                out[unsigned(target * size + d)] = mixed[unsigned(row * size + d)] / total[row] if seen else FLOAT(0.0)
            lse[target] = highest[row] + math.log(total[row]) if seen else -np.inf


@njit(cache=True, nogil=True, fastmath=FAST)
def attend_share(
    mine, threads, items, products, query, caches, floats, in_place, strides, table, sizes, options, whole, parts
):
    """Compute the items of thread `mine`. All work is divided into `threads` equal shares; a thread goes through the
    whole list, and takes the items whose middle lies in its share."""
    before = 0
    for i in range(len(items)):
        item = items[i]
        work = item.count * max(0, item.end - item.begin)
        if (2 * before + work) * threads // (2 * products + 1) == mine:
            out, lse = whole if item.parts == 1 else parts
            attend(item, query, caches, floats, in_place, strides, table, sizes, options, out, lse)
        before += work


@njit(cache=True, nogil=True)
def merge(items, num_heads, size, parts_out, parts_lse, out, lse):
    """Join the parts of each split query, as merge_states does: a part weighs e**lse."""
    for i in range(len(items)):
        item = items[i]
        if item.part > 0 or item.parts == 1:
            continue
        rows = item.count * num_heads  # of a part; the next part begins as many rows further
        for r in range(rows):
            first, target = item.to * num_heads + r, item.query * num_heads + r
            top = parts_lse[first : first + item.parts * rows : rows].max()
            total = FLOAT(0.0)
            out[target * size : (target + 1) * size] = 0.0
            for row in range(first, first + item.parts * rows, rows):
                weight = FLOAT(math.exp(parts_lse[row] - top)) if top != -np.inf else FLOAT(0.0)
                total += weight
                for d in range(size):
                    out[unsigned(target * size + d)] += weight * parts_out[unsigned(row * size + d)]
            for d in range(size):
                out[unsigned(target * size + d)] /= total if total != 0 else FLOAT(1.0)
            lse[target] = top + math.log(total) if total != 0 else -np.inf
