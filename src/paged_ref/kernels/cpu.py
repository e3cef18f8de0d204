"""Paged and contiguous attention for CPU threads: one loop for both, compiled by Numba.

The loop order, from the outside in, and why:

    item   a few queries of one sequence, with the keys that they may see. Threads share the items.
     tile    16 keys. Their slots are looked up once: this is all that paging costs.
      head     one KV head, so that a tile's K and V rows stay in the cache while every row uses them
       rows      all query heads of its group, for all queries of the item: each K row is read once for
                 all of them. Four rows by four keys at a time is what fits in the vector registers.

The softmax is online, one step for each tile (Milakov and Gimelshein 2018), so no score outlives its tile.
While a tile is computed, the next one is prefetched: rows of a tile lie a token apart, which the
hardware's own prefetcher does not follow, and decoding does little else than wait for K and V.

A contiguous region is one block that is long enough for everything. So `naive_attention` runs the same
code with a table of one entry, and the two differ by the addresses alone.

Items are cut by fixed rules (QUERIES, PART), never by what else is in the batch or by the number of
threads: a sequence gets the same bits in any company.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .arguments import AttentionCall

TILE = 16  # keys: one 512-bit vector of scores
ROWS = 64  # (query, head) rows of an item for each KV head: enough work for each K row, and still in L2
PART = 512  # keys of an item whose sequence has no other queries: a long sequence feeds several threads
SMALL = 1 << 18  # query-key products times head_size below which waking threads costs more than it saves
FOREVER = 1 << 40  # a window or a block that never ends
FLOAT, LINE = np.float32, 16  # a cache line is 16 floats
# Sums may be reordered and fused. The flags that assume "no NaN, no infinity" stay off: -inf means hidden.
FAST = {"reassoc", "contract", "nsz", "arcp"}

# The threads are Python's own: compiled code lets go of the interpreter (nogil), so they run side by side.
# Numba's parallel loops were tried. Their OpenMP threads spin after each loop and slow NumPy's BLAS, which the
# model runs between two calls, 2 to 4 times, unless the whole process is told otherwise before OpenMP loads;
# their other layer aborts when two Python threads use it; and both compile the loop a second time, which
# doubled the wait on first use. Waking a Python thread costs about 10 us (OpenMP: 6, when told to sleep).
THREADS = int(numba.config.NUMBA_NUM_THREADS)  # the cores of this process, or the variable of that name


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="attention")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_threads(function, threads, *arguments) -> None:
    """Run `function(mine, threads, *arguments)` for each `mine` below `threads`, one of them here."""
    others = [_pool().submit(function, mine, threads, *arguments) for mine in range(1, threads)]
    function(0, threads, *arguments)
    for other in others:
        other.result()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    for name in ("query", "keys", "values"):
        array = getattr(call, name)
        if not isinstance(array, np.ndarray):
            return f"{name} is not in host memory"
        if array.dtype == np.float64:
            return f"{name} is float64, and this backend computes in float32"
        if array.dtype == np.float16 and llvm.get_host_cpu_features().get("f16c") is False:
            return f"{name} is float16, and this CPU has no conversion from it (F16C)"
        if name != "query" and min(array.strides, default=0) < 0:
            return f"{name} has a negative stride"
    return None


def attention(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    if call.query.size == 0:
        return
    group_size = call.num_heads // call.num_kv_heads
    if call.block_tables is not None:
        table, block_size = _whole(call.block_tables), call.block_size
    else:  # one block for everything, which begins at the region's first slot
        table, block_size = _whole(call.starts.reshape(-1, 1)), FOREVER
    keys, key_strides = _flat(call.keys)
    values, value_strides = _flat(call.values)
    in_place = call.keys.dtype == np.float32 and key_strides[3] == value_strides[3] == 1
    query = np.multiply(call.query, FLOAT(call.scale), dtype=FLOAT)  # [num_tokens, num_heads, head_size]
    direct = call.out.dtype == np.float32 and call.out.flags.c_contiguous
    out = call.out if direct else np.empty(call.out.shape, dtype=FLOAT)
    lse = np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse
    nothing = _frozen(np.empty(0, FLOAT))

    window = min(call.sliding_window or FOREVER, FOREVER)
    items, split_rows, products = plan(
        _whole(call.seq_lens), _whole(call.query_start_loc), window, max(1, ROWS // group_size)
    )
    part_out = np.empty(split_rows * call.num_heads * call.head_size, FLOAT)
    part_lse = np.empty(split_rows * call.num_heads, FLOAT)
    arguments = (
        items, products, _frozen(query.reshape(-1)),
        keys, values, keys if in_place else nothing, values if in_place else nothing, in_place,
        np.array((key_strides, value_strides)), table,
        np.array((block_size, call.num_kv_heads, group_size, call.head_size)),
        window, FLOAT(call.softcap or 0.0),
        # No slope is a slope of 0, and no sink is a sink of -inf: the loop need not ask.
        _frozen(np.zeros(call.num_heads, FLOAT) if call.alibi_slopes is None else call.alibi_slopes),
        _frozen(np.full(call.num_heads, -np.inf, FLOAT) if call.sinks is None else call.sinks),
        out.reshape(-1), lse.reshape(-1), part_out, part_lse,
    )  # fmt: skip
    small = products * call.num_heads * call.head_size < SMALL
    in_threads(attend_share, 1 if small else min(THREADS, len(items)), *arguments)
    if split_rows:
        merge_all(items, call.num_heads, call.head_size, part_out, part_lse, out.reshape(-1), lse.reshape(-1))
    if not direct:
        call.out[...] = out


def _frozen(array):
    """A read-only view. Numba compiles anew for each type, and a writeable array is another type."""
    view = array.view()
    view.flags.writeable = False
    return view


def _whole(array):
    return _frozen(np.ascontiguousarray(array, dtype=np.int64))


def _flat(cache):
    """The cache's memory as one row of elements, and what a block, a token, a head and a dim step over in it.

    float16 goes as its bits: Numba has no float16 on a CPU. A contiguous region's slots are its tokens.
    """
    if cache.dtype == np.float16:
        cache = cache.view(np.uint16)
    strides = tuple(stride // cache.itemsize for stride in cache.strides)
    if cache.flags.c_contiguous:
        row = cache.reshape(-1)
    else:
        last = sum((size - 1) * stride for size, stride in zip(cache.shape, strides, strict=True))
        size = last + 1 if cache.size else 0
        row = np.lib.stride_tricks.as_strided(cache, (size,), (cache.itemsize,))
    return _frozen(row), strides if cache.ndim == 4 else (strides[0], *strides)


@intrinsic
def to_float(typingctx, number):
    """float32 from float32, or from the 16 bits of a float16: one instruction for a whole vector."""

    def build(context, builder, signature, arguments):
        if number == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(number), build


@intrinsic
def float_of_bits(typingctx, bits):
    """The float32 with these bits."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index], into L2. Reads nothing, waits for nothing."""

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
    """e**x for x <= 0 to float32's precision: 2**n * 2**f, the second by its series. math.exp would be a call
    for each number; this the compiler does for 16 at a time."""
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
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(forceinline=True)
def u(index):
    """An index that is not negative. Numba lets a signed index count from the end, and that test keeps the
    compiler from seeing that a[i + d] for d = 0, 1, 2... is one vector."""
    return np.uint64(index)


# One piece of work: `count` queries of sequence `s` from row `query` on, the first at `position` in its sequence,
# over the keys from `begin` to before `end`. Where a query's keys are split, this is part `part` of `parts`, and its
# result goes to the rows from `to` on of the partial results; else to the queries' own rows.
ITEM = np.dtype([(name, np.int64) for name in (["s", "query", "count", "position", "begin", "end", "part", "parts", "to"])])


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
    """Where the rows of the tile at key `first` begin: slot_of, times the strides. After the last key that
    key is repeated, so that a short tile needs no loops of its own and still reads nothing but its keys."""
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
def ahead(cache, at, strides, first, num_kv_heads, width):
    """Prefetch four head rows of the next tile, in the order in which they lie in memory."""
    for j in range(first, first + 4):
        row = at[j // num_kv_heads] + (j % num_kv_heads) * strides[2]
        for d in range(0, width, LINE):
            prefetch(cache, row + d)


@njit(fastmath=FAST, forceinline=True)
def unpack(rows, cache, at, offset, step, head_size):
    """Copy one head of a tile to rows [TILE, head_size] of float32, from any type and any stride."""
    for t in range(TILE):
        source, target = at[t] + offset, t * head_size
        if step == 1:  # said apart, so that the compiler sees a vector
            for d in range(head_size):
                rows[u(target + d)] = to_float(cache[u(source + d)])
        else:
            for d in range(head_size):
                rows[u(target + d)] = to_float(cache[u(source + d * step)])


@njit(fastmath=FAST, forceinline=True)
def dots(scores, r, t, query, q, keys, k0, k1, k2, k3, size):
    """scores[r:r+4, t:t+4] = four query rows, from `q` on, times the key rows at k0 to k3."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = FLOAT(0.0)
    for d in range(size):
        qa, qb = query[u(q + d)], query[u(q + size + d)]
        qc, qd = query[u(q + 2 * size + d)], query[u(q + 3 * size + d)]
        x0, x1, x2, x3 = keys[u(k0 + d)], keys[u(k1 + d)], keys[u(k2 + d)], keys[u(k3 + d)]
        a0, a1, a2, a3 = a0 + qa * x0, a1 + qa * x1, a2 + qa * x2, a3 + qa * x3
        b0, b1, b2, b3 = b0 + qb * x0, b1 + qb * x1, b2 + qb * x2, b3 + qb * x3
        c0, c1, c2, c3 = c0 + qc * x0, c1 + qc * x1, c2 + qc * x2, c3 + qc * x3
        d0, d1, d2, d3 = d0 + qd * x0, d1 + qd * x1, d2 + qd * x2, d3 + qd * x3
    i = r * TILE + t
    scores[u(i)], scores[u(i + 1)], scores[u(i + 2)], scores[u(i + 3)] = a0, a1, a2, a3
    i += TILE
    scores[u(i)], scores[u(i + 1)], scores[u(i + 2)], scores[u(i + 3)] = b0, b1, b2, b3
    i += TILE
    scores[u(i)], scores[u(i + 1)], scores[u(i + 2)], scores[u(i + 3)] = c0, c1, c2, c3
    i += TILE
    scores[u(i)], scores[u(i + 1)], scores[u(i + 2)], scores[u(i + 3)] = d0, d1, d2, d3


@njit(fastmath=FAST, forceinline=True)
def add_values(mixed, m, weights, r, t, values, v0, v1, v2, v3, size):
    """Two rows of `mixed`, from `m` on, += weights[r:r+2, t:t+4] times the value rows at v0 to v3."""
    i, j, n = r * TILE + t, (r + 1) * TILE + t, m + size
    a0, a1, a2, a3 = weights[u(i)], weights[u(i + 1)], weights[u(i + 2)], weights[u(i + 3)]
    b0, b1, b2, b3 = weights[u(j)], weights[u(j + 1)], weights[u(j + 2)], weights[u(j + 3)]
    for d in range(size):
        x0, x1, x2, x3 = values[u(v0 + d)], values[u(v1 + d)], values[u(v2 + d)], values[u(v3 + d)]
        a = mixed[u(m + d)] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        b = mixed[u(n + d)] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        mixed[u(m + d)] = a
        mixed[u(n + d)] = b


@njit(fastmath=FAST, forceinline=True)
def adjust(scores, r, first, position, end, window, softcap, slope):
    """From products to scores: softcap, ALiBi, and -inf for the keys of the tile at `first` that row r, at
    `position`, does not see. Returns the highest score."""
    if softcap > 0:
        for t in range(TILE):
            scores[r * TILE + t] = softcap * math.tanh(scores[r * TILE + t] / softcap)
    latest, earliest = np.int32(min(position, end - 1) - first), np.int32(max(position - window, -1) - first)
    before = np.int32(first - position)
    highest = FLOAT(-np.inf)
    for t in range(TILE):
        i, key = u(r * TILE + t), np.int32(t)
        score = scores[i] + slope * FLOAT(key + before)
        if key > latest:
            score = FLOAT(-np.inf)
        if key <= earliest:
            score = FLOAT(-np.inf)
        scores[i] = score
        highest = max(highest, score)
    return highest


@njit(fastmath=FAST, forceinline=True)
def weigh(weights, r, shift):
    """The scores of row r become weights, e**(score - shift); returns their sum."""
    total = FLOAT(0.0)
    for t in range(TILE):
        weight = exp(weights[u(r * TILE + t)] - shift)
        weights[u(r * TILE + t)] = weight
        total += weight
    return total


@njit(fastmath=FAST, forceinline=True)
def attend(item, query, keys, values, keys32, values32, in_place, strides, table, sizes, window, softcap, slopes,
           sinks, out, lse):  # fmt: skip
    """Compute one item, into `out` and `lse`. A row is a (query, head) pair of one KV head. Rows come in
    fours; those past the last pair are queries of zeros, and nobody reads what becomes of them."""
    key_strides, value_strides = strides[0], strides[1]
    block_size, num_kv_heads, group_size, size = sizes[0], sizes[1], sizes[2], sizes[3]
    num_heads, pairs = num_kv_heads * group_size, item.count * group_size
    rows = -(-pairs // 4) * 4
    q = np.zeros(num_kv_heads * rows * size, FLOAT)  # [num_kv_heads, rows, head_size], and `mixed` too
    mixed = np.zeros(num_kv_heads * rows * size, FLOAT)
    highest, total = np.zeros(num_kv_heads * rows, FLOAT), np.zeros(num_kv_heads * rows, FLOAT)
    weights = np.zeros(rows * TILE, FLOAT)  # [rows, TILE], scores at first
    for head in range(num_kv_heads):
        for r in range(pairs):
            row, q_head = head * rows + r, head * group_size + r % group_size
            source = ((item.query + r // group_size) * num_heads + q_head) * size
            for d in range(size):
                q[u(row * size + d)] = query[u(source + d)]
            # The sink is a key without a value, seen before all others.
            highest[row] = sinks[q_head] if item.part == 0 else -np.inf
            total[row] = 1.0 if highest[row] > -np.inf else 0.0

    key_at, value_at = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    next_key_at, next_value_at = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    in_tile = np.arange(TILE) * size  # where the rows of an unpacked tile begin
    key_copy, value_copy = np.empty(TILE * size, FLOAT), np.empty(TILE * size, FLOAT)
    key_rows, value_rows = (keys32, values32) if in_place else (key_copy, value_copy)
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
                    ahead(keys, next_key_at, key_strides, head * TILE + t, num_kv_heads, size)
                for r in range(0, rows, 4):
                    dots(weights, r, t, q, (base + r) * size, key_rows,
                         k[t] + k_head, k[t + 1] + k_head, k[t + 2] + k_head, k[t + 3] + k_head, size)  # fmt: skip
            for r in range(pairs):
                row, position = base + r, item.position + r // group_size
                slope = slopes[head * group_size + r % group_size]
                top = max(highest[row], adjust(weights, r, first, position, item.end, window, softcap, slope))
                if top > highest[row]:  # what was summed before shrinks to the new scale
                    shrink = exp(highest[row] - top)
                    highest[row] = top
                    total[row] *= shrink
                    for d in range(size):
                        mixed[u(row * size + d)] *= shrink
                # While no key was seen, top is -inf, and -inf - -inf would be NaN.
                total[row] += weigh(weights, r, top if top > -np.inf else FLOAT(0.0))
            for t in range(0, TILE, 4):
                if more:
                    ahead(values, next_value_at, value_strides, head * TILE + t, num_kv_heads, size)
                for r in range(0, rows, 2):
                    add_values(mixed, (base + r) * size, weights, r, t, value_rows,
                               v[t] + v_head, v[t + 1] + v_head, v[t + 2] + v_head, v[t + 3] + v_head, size)  # fmt: skip

    for head in range(num_kv_heads):
        for r in range(pairs):
            row = head * rows + r
            target = (item.to + r // group_size) * num_heads + head * group_size + r % group_size
            seen = total[row] != 0  # NaN counts as seen: it has to show
            for d in range(size):
                out[u(target * size + d)] = mixed[u(row * size + d)] / total[row] if seen else FLOAT(0.0)
            lse[target] = highest[row] + math.log(total[row]) if seen else -np.inf


@njit(cache=True, nogil=True, fastmath=FAST)
def merge(item, num_heads, size, part_out, part_lse, out, lse):
    """Join the parts of one query chunk, of which `item` is the first, as merge_states does."""
    for i in range(item.count * num_heads):
        first, step = item.to * num_heads + i, item.count * num_heads  # the next part is `step` further
        target = item.query * num_heads + i
        top = FLOAT(-np.inf)
        for part in range(item.parts):
            top = max(top, part_lse[first + part * step])
        if top == -np.inf:
            top = FLOAT(0.0)
        total = FLOAT(0.0)
        for d in range(size):
            out[u(target * size + d)] = 0.0
        for part in range(item.parts):
            source = first + part * step
            weight = FLOAT(math.exp(part_lse[source] - top))
            total += weight
            for d in range(size):
                out[u(target * size + d)] += weight * part_out[u(source * size + d)]
        if total != 0:
            for d in range(size):
                out[u(target * size + d)] /= total
        lse[target] = top + math.log(total) if total != 0 else -np.inf


@njit(cache=True, nogil=True, fastmath=FAST)
def attend_share(mine, threads, items, products, query, keys, values, keys32, values32, in_place, strides, table,
                 sizes, window, softcap, slopes, sinks, out, lse, part_out, part_lse):  # fmt: skip
    """The items of thread `mine`. Each thread walks the whole list, and takes an item when the item's middle
    lies in its share, out of `threads` equal shares, of all the work."""
    before = 0
    for i in range(len(items)):
        item = items[i]
        work = item.count * max(0, item.end - item.begin)
        if (2 * before + work) * threads // (2 * products + 1) == mine:
            to_out, to_lse = (out, lse) if item.parts == 1 else (part_out, part_lse)
            attend(item, query, keys, values, keys32, values32, in_place, strides, table, sizes, window, softcap,
                   slopes, sinks, to_out, to_lse)  # fmt: skip
        before += work


@njit(cache=True, nogil=True)
def merge_all(items, num_heads, size, part_out, part_lse, out, lse):
    for i in range(len(items)):
        if items[i].parts > 1 and items[i].part == 0:
            merge(items[i], num_heads, size, part_out, part_lse, out, lse)
