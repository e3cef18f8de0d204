"""Backend `cpu`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So `naive_attention` runs the same loop
with a table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, never by what else is in the batch or by the number of threads: a
sequence gets the same bits in any company.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
from llvmlite import binding as llvm

from ..extras.formats import BFLOAT16, FLOAT8, decode, encode
from ..interop.arguments import AttentionCall
from .cpu_loop import FLOAT, attend_share, merge, plan

ROWS = 64  # (query, head) rows of an item for each KV head: enough work for each K row, and still in L2
SMALL = 1 << 18  # query-key products times head_size below which waking threads costs more than it saves
FOREVER = 1 << 40  # a window or a block that never ends

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
        halves = {np.dtype(np.float16): "float16", FLOAT8: "float8, which goes by way of float16"}
        if array.dtype in halves and llvm.get_host_cpu_features().get("f16c") is False:
            return f"{name} is {halves[array.dtype]}, and this CPU has no conversion from it (F16C)"
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
    in_place = call.keys.dtype == np.float32 and key_strides[3] == value_strides[3] == 1 and not call.copy_tiles
    query = np.multiply(decode(call.query), FLOAT(call.scale), dtype=FLOAT)  # [num_tokens, num_heads, head_size]
    if call.key_scales is not None:  # a head's scale is a factor of all its scores: the loop need not know it
        query *= np.repeat(call.key_scales, group_size)[:, None]
    direct = call.out.dtype == np.float32 and call.out.flags.c_contiguous
    out = call.out if direct else np.empty(call.out.shape, dtype=FLOAT)
    lse = np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse
    window = min(call.sliding_window or FOREVER, FOREVER)
    items, split_rows, products = plan(
        _whole(call.seq_lens), _whole(call.query_start_loc), window, max(1, ROWS // group_size)
    )
    parts_out = np.empty(split_rows * call.num_heads * call.head_size, FLOAT)
    parts_lse = np.empty(split_rows * call.num_heads, FLOAT)
    # No slope is a slope of 0, and no sink is a sink of -inf: the loop need not ask.
    slopes = np.zeros(call.num_heads, FLOAT) if call.alibi_slopes is None else call.alibi_slopes
    sinks = np.full(call.num_heads, -np.inf, FLOAT) if call.sinks is None else call.sinks
    nothing = _frozen(np.empty(0, FLOAT))
    small = products * call.num_heads * call.head_size < SMALL
    in_threads(
        attend_share, 1 if small else min(THREADS, len(items)), items, products, _frozen(query.reshape(-1)),
        (keys, values), (keys, values) if in_place else (nothing, nothing), in_place, (key_strides, value_strides),
        table, (block_size, call.num_kv_heads, group_size, call.head_size),
        (window, FLOAT(call.softcap or 0.0), _whole(slopes, FLOAT), _whole(sinks, FLOAT)),
        (out.reshape(-1), lse.reshape(-1)), (parts_out, parts_lse),
    )  # fmt: skip
    if split_rows:
        merge(items, call.num_heads, call.head_size, parts_out, parts_lse, out.reshape(-1), lse.reshape(-1))
    if call.value_scales is not None:
        out *= np.repeat(call.value_scales, group_size)[:, None]
    if not direct:
        call.out[...] = encode(out, call.out.dtype)


_AS = {np.dtype(np.float16): np.uint16, BFLOAT16: np.int16}


def _frozen(array):
    """A read-only view. Numba compiles anew for each type, and a writeable array is another type."""
    view = array.view()
    view.flags.writeable = False
    return view


def _whole(array, dtype=np.int64):
    return _frozen(np.ascontiguousarray(array, dtype=dtype))


def _flat(cache):
    """The cache's memory as one row of elements, and what a block, a token, a head and a dim step over in it.

    float16 goes as its bits, since Numba has none on a CPU, and so the bits of bfloat16 go as another type:
    cpu_loop.to_float knows them all. A contiguous region's slots are its tokens.
    """
    if cache.dtype in _AS:
        cache = cache.view(_AS[cache.dtype])
    strides = tuple(stride // cache.itemsize for stride in cache.strides)
    if cache.flags.c_contiguous:
        row = cache.reshape(-1)
    else:
        last = sum((size - 1) * stride for size, stride in zip(cache.shape, strides, strict=True))
        size = last + 1 if cache.size else 0
        row = np.lib.stride_tricks.as_strided(cache, (size,), (cache.itemsize,))
    return _frozen(row), strides if cache.ndim == 4 else (strides[0], *strides)
