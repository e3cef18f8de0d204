"""Backend `cpu-simd`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So contiguous attention runs the same loop with a
table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, which do not depend on the rest of the batch or on the number of threads: a
sequence gets the same bits in any batch.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from llvmlite import binding as llvm

from ..core.attention.attention import Addresses, AttentionCall
from ..extras.formats import BFLOAT16, FLOAT8, decode, encode
from ..extras.variants import PLAIN, Variant
from . import cpu_machine as machine
from .cpu_code import function
from .cpu_machine import LANES, TILE
from .threads import in_threads, num_threads

FLOAT, INT = np.float32, np.int64
NO_LIMIT = 1 << 40  # a window or a block that holds every sequence
NUM_FIELDS = 12  # of an item: cpu_loop.py names them


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")  # asked without importing the compiler
    return "its loop is for the compiler, and NUMBA_DISABLE_JIT is set" if disabled else None


@cache
def _converts_halves() -> bool:
    return llvm.get_host_cpu_features().get("f16c") is not False


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    for name in ("query", "keys", "values"):
        array = getattr(call, name)
        if not isinstance(array, np.ndarray):
            return f"{name} is not in host memory"
        if array.dtype == np.float64:
            return f"{name} is float64, and this backend computes in float32"
        halves = {np.dtype(np.float16): "float16", FLOAT8: "float8, which goes by way of float16"}
        if array.dtype in halves and not _converts_halves():
            return f"{name} is {halves[array.dtype]}, and this CPU has no conversion from it (F16C)"
        if name != "query" and min(array.strides, default=0) < 0:
            return f"{name} has a negative stride"
    return None


def in_bounds(addresses: Addresses, num_tokens: int, num_blocks: int, block_size: int) -> bool:
    """Whether Addresses.check with these arguments would find nothing. For paged memory; one walk, in compiled code."""
    arrays = (addresses.seq_lens, addresses.query_start_loc, addresses.block_tables)
    seq_lens, loc, table = (np.ascontiguousarray(array, INT) for array in arrays)
    wrong, sizes = np.zeros(1, INT), (len(seq_lens), table.shape[1], num_tokens, num_blocks, block_size)
    function("bounds")(_at(wrong), _at(seq_lens), _at(loc), _at(table), *sizes)
    return not wrong[0]


def attend(call: AttentionCall, copy_tiles: bool = False) -> None:
    """Fill `call.out` and `call.lse`.

    `copy_tiles`: copy each tile of K and V before it is read, also where it could be read in place. Faster where most
    of the cache is not in the processor's caches and rows are read several times.
    """
    if call.query.size == 0:
        return
    num_tokens, num_heads, head_size = call.query.shape
    variant, num_kv_heads = call.variant or PLAIN, call.keys.shape[-2]
    num_rows, num_columns = machine.block_of(num_heads // num_kv_heads, head_size)
    padded = -(-head_size // LANES) * LANES
    plan = _Plan(call, num_rows)
    heads = _no_variant(num_heads + num_rows) if call.variant is None else _per_head(variant, num_heads, num_rows)
    query = _query(call, variant, padded, num_rows)
    direct = call.out.dtype == FLOAT and call.out.flags.c_contiguous and padded == head_size
    out = call.out if direct else np.empty((num_tokens, num_heads, padded), FLOAT)
    lse = np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse
    part_rows = plan.part_tokens * num_heads
    parts = np.empty(part_rows * (padded + 1), FLOAT)

    sizes = plan.sizes(call, padded, copy_tiles, not variant.softcap and variant.alibi_slopes is None)
    threads = 1
    if plan.products * num_heads * head_size >= machine.MIN_PARALLEL_WORK:
        threads = min(num_threads(), plan.num_items)
    scratch = _Scratch(threads, plan.most_blocks, num_rows, padded, call.keys.dtype)
    loop = function("attend_items", _LETTERS[call.keys.dtype], num_rows, num_columns)
    parts_out, slopes = _at(parts), _at(heads)
    given = (
        plan.items, _at(sizes), variant.softcap or 0.0, _at(query), _at(call.keys), _at(call.values), _at(plan.table),
        slopes, slopes + heads.strides[0],
    )  # fmt: skip
    results = (_at(out), _at(lse), parts_out, parts_out + part_rows * padded * FLOAT().itemsize)

    def share(mine: int, threads: int) -> None:
        loop(scratch.counter, *given, *scratch.of(mine), *results)

    in_threads(share, threads)
    if part_rows:
        function("merge")(plan.items, plan.num_items, num_heads, padded, *results[2:], *results[:2])
    if variant.value_scales is not None:
        out *= np.repeat(variant.value_scales, num_heads // num_kv_heads)[:, None]
    if not direct:
        call.out[...] = encode(out[:, :, :head_size], call.out.dtype)


# The loop's loads know a format by the letter of its dtype. float16 goes as its bits, and bfloat16 as another type.
_LETTERS = {
    np.dtype(np.float32): "f", np.dtype(np.float16): "H", BFLOAT16: "h", np.dtype(np.int8): "b", FLOAT8: "B",
}  # fmt: skip


class _Plan:
    """A call's work, cut into items, and its addresses as the loop takes them."""

    def __init__(self, call: AttentionCall, num_rows: int) -> None:
        num_tokens, num_heads, _ = call.query.shape
        num_kv_heads = call.keys.shape[-2]
        addresses = call.addresses
        if addresses.block_tables is not None:
            self.table, self.block_size = np.ascontiguousarray(addresses.block_tables, INT), call.keys.shape[1]
        else:  # one block for everything, which begins at the region's first slot
            self.table, self.block_size = np.ascontiguousarray(addresses.starts, INT)[:, None], NO_LIMIT
        self.window = min(call.window or NO_LIMIT, NO_LIMIT)
        token_blocks = self.token_blocks = -(-num_heads // num_kv_heads // num_rows)  # of a token and a KV head
        few, many = (max(1, rows // (token_blocks * num_rows)) for rows in (machine.FEW_ROWS, machine.MANY_ROWS))
        self.most_blocks = max(num_kv_heads * few, many) * token_blocks  # of an item
        seq_lens = np.ascontiguousarray(addresses.seq_lens, INT)
        loc = np.ascontiguousarray(addresses.query_start_loc, INT)
        num_seqs = len(seq_lens)
        most_items = (
            int(seq_lens.sum()) // machine.PART_KEYS + num_seqs + num_kv_heads * (num_tokens // many + num_seqs)
        )
        self._memory = np.empty(3 + most_items * NUM_FIELDS, INT)
        found = _at(self._memory)
        self.items = found + 3 * self._memory.itemsize
        places = (found, self.items, _at(seq_lens), _at(loc))
        function("plan")(*places, num_seqs, self.window, num_kv_heads, many, few)
        # How many items; the rows of partial results; the query-key products of a head
        self.num_items, self.part_tokens, self.products = self._memory[:3].tolist()

    def sizes(self, call: AttentionCall, padded: int, copy_tiles: bool, plain: bool) -> np.ndarray:
        """The numbers of the call, in the order of cpu_loop.py."""
        (_, num_heads, head_size), num_kv_heads, itemsize = call.query.shape, call.keys.shape[-2], call.keys.itemsize
        strides = [stride // itemsize for cache in (call.keys, call.values) for stride in _strides(cache)]
        in_place = padded == head_size and strides[3] == strides[7] == 1 and not copy_tiles
        passes = machine.passes_of(num_kv_heads * head_size * itemsize, head_size * itemsize)
        return np.array(
            [self.num_items, num_heads, num_kv_heads, num_heads // num_kv_heads, head_size, padded, self.window,
             self.block_size, self.table.shape[1], in_place, *passes, plain, *strides, self.most_blocks, self.token_blocks], INT,
        )  # fmt: skip


def _strides(cache: np.ndarray) -> tuple[int, ...]:
    """Bytes from a block, a slot, a head and a number to the next. A contiguous region's slots are its tokens."""
    return cache.strides if cache.ndim == 4 else (cache.strides[0], *cache.strides)


def _query(call: AttentionCall, variant: Variant, padded: int, num_rows: int) -> np.ndarray:
    """The query, scaled, [num_tokens * num_heads + a block, padded]: the last block may be read beyond its heads."""
    num_tokens, num_heads, head_size = call.query.shape
    array = np.zeros((num_tokens * num_heads + num_rows, padded), FLOAT)
    rows = array[:-num_rows].reshape(num_tokens, num_heads, padded)[:, :, :head_size]
    np.multiply(decode(call.query), FLOAT(call.scale), dtype=FLOAT, out=rows)
    if variant.key_scales is not None:  # a head's scale is a factor of all its scores, so the loop needs no scales
        rows *= np.repeat(variant.key_scales, num_heads // len(variant.key_scales))[:, None]
    return array


def _per_head(variant: Variant, num_heads: int, num_rows: int) -> np.ndarray:
    """Slopes and sinks, [2, num_heads + a block]. No slope is 0, no sink is -inf: the loop has no branch for them."""
    heads = np.array(_no_variant(num_heads + num_rows))
    for row, given in zip(heads, (variant.alibi_slopes, variant.sinks), strict=True):
        if given is not None:
            row[:num_heads] = given
    return heads


@cache
def _no_variant(count: int) -> np.ndarray:
    return np.repeat(np.array([[0], [-np.inf]], FLOAT), count, axis=1)


class _Scratch:
    """Memory of the threads, each with its own, and the counter that they share."""

    def __init__(self, threads: int, blocks: int, num_rows: int, padded: int, dtype: np.dtype[Any]) -> None:
        line = 64  # a thread's memory begins at a cache line, where a vector is loaded in one piece
        sums = blocks * (num_rows * (padded + TILE) + 2 * LANES) * 4
        copied = TILE * padded * dtype.itemsize  # one head of a tile; zeros beyond the head size
        places = 5 * TILE * 8
        *self._offsets, self._stride = accumulate(
            (-(-size // line) * line for size in (sums, copied, places)), initial=0
        )
        self._memory = np.zeros(2 * line + threads * self._stride, np.uint8)
        self.counter = -(-_at(self._memory) // line) * line

    def of(self, thread: int) -> list[int]:
        """Where the thread's sums, its copy of a tile and its places of rows lie."""
        begin = self.counter + 64 + thread * self._stride
        return [begin + offset for offset in self._offsets]


def _at(array: Any) -> int:
    """Where the first element lies. NumPy's own way takes four times as long, and is left to arrays that are read-only,
    empty or in pieces."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError, BufferError):
        return int(array.ctypes.data)
