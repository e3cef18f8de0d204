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

import os
import threading

import numpy as np

# Numba's OpenMP threads spin for a while after a loop, and so take the cores from NumPy's BLAS, which the
# model runs between two calls: its products then take 2 to 4 times as long. Passive threads sleep; waking
# them costs about 5 us (the workqueue layer: 30, and it aborts when two Python threads use it at once).
# OpenMP reads this once, when Numba first loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import llvmlite.binding as llvm
from llvmlite import ir
from numba import get_num_threads, njit, prange, types
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

_one_at_a_time = threading.Lock()  # a parallel loop has all threads anyway, and not every layer is re-entrant


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
    nothing = np.zeros(0, dtype=FLOAT)

    seq_lens, query_start_loc = _whole(call.seq_lens), _whole(call.query_start_loc)
    window = call.sliding_window or FOREVER
    items, cost = plan(seq_lens, query_start_loc, min(window, FOREVER), max(1, ROWS // group_size))
    arguments = (
        items, query.reshape(-1),
        keys, values, keys if in_place else _frozen(nothing), values if in_place else _frozen(nothing), in_place,
        key_strides, value_strides, table, (block_size, call.num_kv_heads, group_size, call.head_size),
        min(window, FOREVER), FLOAT(call.softcap or 0.0),
        # No slope is a slope of 0, and no sink is a sink of -inf: the loop need not ask.
        np.zeros(call.num_heads, FLOAT) if call.alibi_slopes is None else call.alibi_slopes,
        np.full(call.num_heads, -np.inf, FLOAT) if call.sinks is None else call.sinks,
        out.reshape(-1), nothing if call.lse is None else call.lse.reshape(-1),
    )  # fmt: skip
    threads = min(get_num_threads(), len(items))
    if threads == 1 or cost * call.num_heads * call.head_size < SMALL:
        run_alone(*arguments)
    else:
        with _one_at_a_time:
            run_threads(threads, *arguments)
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


@njit(cache=True, nogil=True)
def plan(seq_lens, query_start_loc, window, queries):
    """The items [num_items, 6]: sequence, first query, queries, first key, last key + 1, parts.

    The parts of one query chunk follow each other; each carries their number. Also the products to compute.
    """
    found, cost = 0, 0
    items = np.empty((64, 6), np.int64)
    for s in range(len(seq_lens)):
        query_len = query_start_loc[s + 1] - query_start_loc[s]
        for first in range(0, query_len, queries):
            count = min(queries, query_len - first)
            position = seq_lens[s] - query_len + first  # of the first query
            begin, end = max(0, position - window + 1), max(0, position + count)
            parts = max(1, -(-(end - begin) // PART)) if query_len <= queries else 1
            for part in range(parts):
                if found == len(items):
                    more = np.empty((2 * found, 6), np.int64)
                    more[:found] = items
                    items = more
                low = begin + part * PART
                high = min(end, low + PART) if parts > 1 else end
                items[found] = (s, query_start_loc[s] + first, count, low, high, parts)
                cost += count * max(0, high - low)
                found += 1
    return items[:found], cost


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
        if step == 1:
            for d in range(head_size):
                rows[u(t * head_size + d)] = to_float(cache[u(at[t] + offset + d)])
        else:
            for d in range(head_size):
                rows[u(t * head_size + d)] = to_float(cache[u(at[t] + offset + d * step)])


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
    scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3] = a0, a1, a2, a3
    scores[r + 1, t], scores[r + 1, t + 1], scores[r + 1, t + 2], scores[r + 1, t + 3] = b0, b1, b2, b3
    scores[r + 2, t], scores[r + 2, t + 1], scores[r + 2, t + 2], scores[r + 2, t + 3] = c0, c1, c2, c3
    scores[r + 3, t], scores[r + 3, t + 1], scores[r + 3, t + 2], scores[r + 3, t + 3] = d0, d1, d2, d3


@njit(fastmath=FAST, forceinline=True)
def add_values(mixed, m, weights, r, t, values, v0, v1, v2, v3, size):
    """Two rows of `mixed`, from `m` on, += weights[r:r+2, t:t+4] times the value rows at v0 to v3."""
    a0, a1, a2, a3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
    b0, b1, b2, b3 = weights[r + 1, t], weights[r + 1, t + 1], weights[r + 1, t + 2], weights[r + 1, t + 3]
    for d in range(size):
        x0, x1, x2, x3 = values[u(v0 + d)], values[u(v1 + d)], values[u(v2 + d)], values[u(v3 + d)]
        a = mixed[u(m + d)] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        b = mixed[u(m + size + d)] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        mixed[u(m + d)] = a
        mixed[u(m + size + d)] = b


@njit(fastmath=FAST, forceinline=True)
def softmax_step(weights, r, highest, total, mixed, m, size):
    """One online step for row r: scores become weights, and what was summed before is scaled to match.

    highest, total: of the row, so far; returns the new ones. m: where the row of `mixed` begins.
    """
    top = highest
    for t in range(TILE):
        top = max(top, weights[r, t])
    if top == -np.inf:  # no key seen yet: -inf - -inf would be NaN
        weights[r, :] = FLOAT(0.0)
        return top, total
    if top > highest:
        shrink = exp(highest - top)
        total *= shrink
        for d in range(size):
            mixed[u(m + d)] *= shrink
    added = FLOAT(0.0)
    for t in range(TILE):
        weight = exp(weights[r, t] - top)
        weights[r, t] = weight
        added += weight
    return top, total + added


@njit(cache=True, nogil=True, fastmath=FAST)
def attend(item, with_sink, state, query, keys, values, keys32, values32, in_place, key_strides, value_strides,
           table, sizes, window, softcap, slopes, sinks):  # fmt: skip
    """One item: `state` [num_kv_heads * rows, head_size + 2] gets, for each row, the weighted sum of values,
    the highest score and the sum of weights. A row is a (query, head) pair; rows come in fours, and those
    without a pair are queries of zeros, whose state nobody reads."""
    block_size, num_kv_heads, group_size, size = sizes
    s, first_query, count, begin, end, _ = item
    num_heads = num_kv_heads * group_size
    rows = -(-count * group_size // 4) * 4
    position = np.empty(rows, np.int64)  # the last key that a row sees
    q = np.zeros(num_kv_heads * rows * size, FLOAT)
    mixed = np.zeros(num_kv_heads * rows * size, FLOAT)
    highest, total = np.empty(num_kv_heads * rows, FLOAT), np.empty(num_kv_heads * rows, FLOAT)
    weights = np.empty((rows, TILE), FLOAT)
    return
