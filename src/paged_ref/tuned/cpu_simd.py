"""Backend `cpu-simd`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So contiguous attention runs the same loop with a
table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, which do not depend on the rest of the batch or on the number of threads: a
sequence gets the same bits in any batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding as llvm
from numpy.typing import DTypeLike

from ..core.attention.attention import AttentionCall
from ..extras.formats import BFLOAT16, FLOAT8, decode, encode
from ..extras.variants import PLAIN
from . import cpu_code as code
from .cpu_machine import LANES, TILE, PART_KEYS, FIELDS, FLOAT
from .flat_views import flat_view

FEW_ROWS = 8  # of an item that reads K and V in place, for all heads; one query may have more
MANY_ROWS = 256  # of an item of one head: they share each copied tile, and lie in L2 beside it
MIN_PARALLEL_WORK = 1 << 18  # query-key products times head_size; for less, waking threads costs more than it saves
NO_LIMIT = 1 << 40  # a window or a block that holds every sequence

# The threads are Python's own: compiled code releases the interpreter (nogil), so they run side by side. The OpenMP
# threads of Numba's parallel loops would spin after each loop and slow NumPy's BLAS, which the model runs between two
# calls, 2 to 4 times. Waking a Python thread costs about 10 us.
THREADS = int(os.environ.get("NUMBA_NUM_THREADS") or len(os.sched_getaffinity(0)))  # the cores of this process, or the variable of that name


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="attention")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_threads(function: Callable[..., None], threads: int, *arguments: Any) -> None:
    """Run `function(mine, threads, *arguments)` for each `mine` below `threads`, one of them in this thread."""
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


def attend(call: AttentionCall, copy_tiles: bool = False) -> None:
    """Fill `call.out` and `call.lse`.

    `copy_tiles`: copy each tile of K and V before it is read, also where it could be read in place. Faster where most
    of the cache is not in the processor's caches and rows are read several times.
    """
    if call.query.size == 0:
        return
    num_tokens, num_heads, head_size = call.query.shape
    num_kv_heads = call.keys.shape[-2]
    group_size = num_heads // num_kv_heads
    addresses, variant = call.addresses, call.variant or PLAIN
    if addresses.block_tables is not None:
        table, block_size = _whole(addresses.block_tables), call.keys.shape[1]
    else:  # one block for everything, which begins at the region's first slot
        table, block_size = _whole(addresses.starts)[:, None], NO_LIMIT
    keys, key_strides = _flat(call.keys)
    values, value_strides = _flat(call.values)
    padded = -(-head_size // LANES) * LANES
    in_place = padded == head_size and key_strides[3] == value_strides[3] == 1 and not copy_tiles
    num_rows = next(r for r in (4, 2, 1) if -group_size % r <= r // 4)
    num_columns = next(c for c in (8, 4, 2, 1) if c * num_rows <= 8 and padded // LANES % c == 0)
    subs = -(-group_size // num_rows)

    query = np.zeros((num_tokens * num_heads + num_rows, padded), FLOAT)
    rows = query[: num_tokens * num_heads].reshape(num_tokens, num_heads, padded)[:, :, :head_size]
    np.multiply(decode(call.query), FLOAT(call.scale), dtype=FLOAT, out=rows)
    if variant.key_scales is not None:  # a head's scale is a factor of all its scores, so the loop needs no scales
        rows *= np.repeat(variant.key_scales, group_size)[:, None]
    direct = call.out.dtype == np.float32 and call.out.flags.c_contiguous and padded == head_size
    out = call.out if direct else np.empty((*call.out.shape[:2], padded), dtype=FLOAT)
    lse = np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse
    window = min(call.window or NO_LIMIT, NO_LIMIT)
    seq_lens, loc = _whole(addresses.seq_lens), _whole(addresses.query_start_loc)
    num_seqs = len(seq_lens)
    most_queries, few_queries = max(1, MANY_ROWS // (subs * num_rows)), max(1, FEW_ROWS // (subs * num_rows))
    capacity = int(seq_lens.sum()) // PART_KEYS + num_seqs + num_kv_heads * (num_tokens // most_queries + num_seqs)
    items = np.empty((capacity, FIELDS), np.int64)
    found = np.zeros(4, np.int64)
    code.function("plan", "IIIIiiiii"[:4] + "iiiii")(
        _at(found), _at(items), _at(seq_lens), _at(loc), num_seqs, window, num_kv_heads, most_queries, few_queries
    )
    num_items, split_rows, products, _ = found.tolist()
    parts_out = np.empty(split_rows * num_heads * padded, FLOAT)
    parts_lse = np.empty(split_rows * num_heads, FLOAT)
    # No slope is a slope of 0, and no sink is a sink of -inf: the loop has no branch for them.
    slopes, sinks = np.zeros(num_heads + num_rows, FLOAT), np.full(num_heads + num_rows, -np.inf, FLOAT)
    if variant.alibi_slopes is not None:
        slopes[:num_heads] = variant.alibi_slopes
    if variant.sinks is not None:
        sinks[:num_heads] = variant.sinks
    plain = not variant.softcap and variant.alibi_slopes is None
    max_blocks = max(num_kv_heads * few_queries, most_queries) * subs
    sizes = np.array([
        num_items, num_heads, num_kv_heads, group_size, head_size, padded, window, block_size, table.shape[1], in_place,
        plain, *key_strides, *value_strides, max_blocks,
    ], np.int64)
    small = products * num_heads * head_size < MIN_PARALLEL_WORK
    threads = 1 if small else min(THREADS, num_items)
    scratch = np.empty((threads, max_blocks * (num_rows * (padded + TILE) + 2 * LANES) + 16), FLOAT)
    copy = np.zeros((threads, TILE * padded), keys.dtype)
    at = np.empty((threads, 3 * TILE), np.int64)
    counter = np.zeros(8, np.int64)
    kind = {"f": "F", "H": "H", "h": "h", "b": "b", "B": "B"}[keys.dtype.char]
    loop = code.function("attend_items", f"IIIfF{kind}{kind}IFFF{kind}IFFFF", num_rows, num_columns)

    def share(mine: int, threads: int) -> None:
        loop(
            _at(counter), _at(items), _at(sizes), variant.softcap or 0.0, _at(query), _at(keys), _at(values), _at(table), _at(slopes), _at(sinks),
            -(-_at(scratch[mine]) // 64) * 64, _at(copy[mine]), _at(at[mine]), _at(out), _at(lse), _at(parts_out), _at(parts_lse),
        )

    in_threads(share, threads)
    if split_rows:
        code.function("merge", "IiiiFFFF")(
            _at(items), num_items, num_heads, padded, _at(parts_out), _at(parts_lse), _at(out), _at(lse)
        )
    if variant.value_scales is not None:
        out *= np.repeat(variant.value_scales, group_size)[:, None]
    if not direct:
        call.out[...] = encode(out[:, :, :head_size], call.out.dtype)


def _at(array: np.ndarray) -> int:
    return array.ctypes.data


_AS: dict[np.dtype[Any], Any] = {np.dtype(np.float16): np.uint16, BFLOAT16: np.int16}


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view. Numba compiles anew for each type, and a writeable array is another type."""
    view = array.view()
    view.flags.writeable = False
    return view


def _whole(array: Any, dtype: DTypeLike = np.int64) -> np.ndarray:
    return _frozen(np.ascontiguousarray(array, dtype=dtype))


def _flat(cache: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """The cache's memory as one row of elements, and the steps from a block, a slot, a head and a number to the next.

    float16 goes as its bits, since Numba has none on a CPU, and so the bits of bfloat16 go as another type:
    cpu_loop.to_float knows them all. A contiguous region's slots are its tokens.
    """
    if cache.dtype in _AS:
        cache = cache.view(_AS[cache.dtype])
    strides = tuple(stride // cache.itemsize for stride in cache.strides)
    return _frozen(flat_view(cache)), strides if cache.ndim == 4 else (strides[0], *strides)
