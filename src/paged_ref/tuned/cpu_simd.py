"""Backend `cpu-simd`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So contiguous attention runs the same loop with a
table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, which do not depend on the rest of the batch or on the number of threads: a
sequence gets the same bits in any batch.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
from llvmlite import binding as llvm

from ..core.attention.attention import Addresses, AttentionCall
from ..extras.formats import BFLOAT16, FLOAT8, decode, encode
from ..extras.variants import PLAIN
from . import cpu_machine as machine
from .cpu_code import address, function, unavailable
from .cpu_machine import LANES, TILE
from .threads import in_threads, num_threads

__all__ = ["attend", "unavailable", "unsupported"]

FLOAT, INT = np.float32, np.int64
NO_LIMIT = 1 << 40  # a window or a block that holds every sequence
NUM_FIELDS = 12  # of an item: cpu_loop.py names them
MOST_KEPT = 1 << 25  # bytes of memory that a thread keeps for its next call
LINE = 64  # bytes: a vector that begins at a cache line is loaded in one piece


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    for name in ("query", "keys", "values"):
        array = getattr(call, name)
        if not isinstance(array, np.ndarray):
            return f"{name} is not in host memory"
        if (reason := _refused(array.dtype)) is not None:
            return f"{name} is {reason}"
        if name != "query" and min(array.strides, default=0) < 0:
            return f"{name} has a negative stride"
    return None


@cache
def _refused(dtype: np.dtype[Any]) -> str | None:
    """What is said of a type of numbers that this backend, or this CPU, cannot take; None where it can."""
    if dtype == np.float64:
        return "float64, and this backend computes in float32"
    halves = {np.dtype(np.float16): "float16", FLOAT8: "float8, which goes by way of float16"}
    if dtype in halves and llvm.get_host_cpu_features().get("f16c") is False:
        return f"{halves[dtype]}, and this CPU has no conversion from it (F16C)"
    return None


def in_bounds(addresses: Addresses, num_tokens: int, num_blocks: int, block_size: int) -> bool:
    """Whether Addresses.check with these arguments would find nothing. For paged memory; one walk, in compiled code."""
    seq_lens, loc, table = _whole(addresses)
    wrong, sizes = np.zeros(1, INT), (len(seq_lens), table.shape[1], num_tokens, num_blocks, block_size)
    function("bounds")(address(wrong), address(seq_lens), address(loc), address(table), *sizes)
    return not wrong[0]


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    if call.query.size == 0:
        return
    shape = _shape_of(call)
    if not shape.in_vectors:
        packed = _packed(call)
        attend(packed)
        call.out[...] = encode(packed.out[:, :, : call.query.shape[2]], call.out.dtype)
        return
    step = getattr(_last, "step", None)
    _last.step = None  # if this call is interrupted, other threads finish their items: their memory is not used again
    key = shape, id(call.addresses), id(call.variant), call.window, len(call.query)
    if step is None or step.key != key:
        step = _Step(call, shape, key, None if step is None else step.memory)
    direct = call.out.dtype == FLOAT and call.out.flags.c_contiguous
    out = call.out if direct else np.empty(call.query.shape, FLOAT)
    step.run(call, out, np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse)
    if len(step.memory) <= MOST_KEPT:
        _last.step = step
    if call.variant is not None and call.variant.value_scales is not None:
        out *= np.repeat(call.variant.value_scales, out.shape[1] // len(call.variant.value_scales))[:, None]
    if not direct:
        call.out[...] = encode(out, call.out.dtype)


# The loop's loads know a format by the type of its numbers. float16 goes as its bits, and bfloat16 as another type.
_TYPES = {
    np.dtype(np.float32): "float32", np.dtype(np.float16): "uint16", BFLOAT16: "int16", np.dtype(np.int8): "int8",
    FLOAT8: "uint8",
}  # fmt: skip


_last = threading.local()  # .step, .whole: those of the last call


def _whole(addresses: Addresses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`seq_lens`, `query_start_loc` and the table as the compiled code reads them: int64, in one piece."""
    known, arrays = getattr(_last, "whole", (None, None))
    if known is not addresses or arrays is None:
        # A contiguous region is one block for everything, which begins at the region's first slot.
        table = addresses.starts[:, None] if addresses.block_tables is None else addresses.block_tables  # type: ignore[index]
        given = addresses.seq_lens, addresses.query_start_loc, table
        arrays = tuple(np.ascontiguousarray(array, INT) for array in given)
        _last.whole = addresses, arrays
    return arrays


class _Shape:
    """What calls with the same shapes and strides have in common."""

    def __init__(
        self, num_heads: int, size: int, dtype: np.dtype[Any], cache_shape: tuple[int, ...], *strides: tuple[int, ...]
    ) -> None:
        """`cache_shape`: of the keys, but for the number of blocks or slots. `strides`: of keys and of values."""
        num_kv_heads, itemsize = cache_shape[-2], dtype.itemsize
        self.in_vectors = size % LANES == 0 and all(of_cache[-1] == itemsize for of_cache in strides)
        num_rows, num_columns = machine.block_of(num_heads // num_kv_heads, size)
        self.num_rows, self.kind = num_rows, (_TYPES[dtype], num_rows, num_columns)
        token_blocks = -(-num_heads // num_kv_heads // num_rows)  # of a token and a KV head
        # The most queries of an item: of all KV heads, and of one.
        self.queries = max(1, machine.ITEM_ROWS // (num_kv_heads * token_blocks * num_rows))
        self.head_queries = max(1, machine.ITEM_ROWS // (token_blocks * num_rows))
        item_blocks = token_blocks * max(num_kv_heads * self.queries, self.head_queries)
        # Of each thread: cpu_loop.state_of with a tile's K and V, and where rows lie.
        self.floats = item_blocks * (num_rows * (size + TILE) + 2 * LANES) + 2 * TILE * size
        self.share = _lines(self.floats * FLOAT().itemsize + 4 * TILE * INT().itemsize)
        # No slope is 0, and no sink is -inf: the loop has no branch for them.
        self.no_slopes, self.no_sinks = (
            _in_lanes(None, absent, num_heads, num_kv_heads, num_rows) for absent in (0.0, -np.inf)
        )
        passes = machine.passes_of(num_kv_heads * size * itemsize, size * itemsize, num_rows * num_columns)
        block_size = NO_LIMIT if len(cache_shape) == 2 else cache_shape[0]
        # From a block, a slot, a head to the next. A contiguous region's slots are its tokens.
        steps = [stride // itemsize for of_cache in strides for stride in (of_cache[0], *of_cache[-3:-1])]
        self.sizes = np.array(
            [0, num_heads, num_kv_heads, num_heads // num_kv_heads, size, token_blocks, item_blocks, 0, block_size, 0,
             *passes, 0, *steps], INT,
        )  # fmt: skip


_make_shape = lru_cache(maxsize=64)(_Shape)


def _shape_of(call: AttentionCall) -> _Shape:
    keys = call.keys
    return _make_shape(*call.query.shape[1:], keys.dtype, keys.shape[1:], keys.strides, call.values.strides)


class _Step:
    """What calls for the layers of a step have in common: the work, cut into items, and memory for the loop's threads.
    The first call makes it, and the others find all made but their own arrays."""

    def __init__(self, call: AttentionCall, shape: _Shape, key: tuple[Any, ...], memory: np.ndarray | None) -> None:
        """`memory`: of the step before, used again where it is large enough."""
        self.key, self._alive = key, (call.addresses, call.variant)  # so that their ids stay theirs
        self.shape, variant = shape, call.variant or PLAIN
        num_tokens, num_heads, size = call.query.shape
        num_kv_heads, window = call.keys.shape[-2], min(call.window or NO_LIMIT, NO_LIMIT)
        seq_lens, loc, table = _whole(call.addresses)
        most_parts, most_blocks = int(seq_lens.sum()) // machine.PART_KEYS, num_tokens // shape.queries
        found = np.empty(4 + (most_parts + most_blocks + (2 + num_kv_heads) * len(loc)) * NUM_FIELDS, INT)
        self.items = address(found) + 4 * found.itemsize
        places = address(found), self.items, address(seq_lens), address(loc)
        function("plan")(*places, len(seq_lens), num_kv_heads, window, shape.queries, shape.head_queries)
        self.num_items, part_tokens, products, copied = found[:4].tolist()  # products: of queries and keys, for a head
        needed = (("attend_in_place", self.num_items - copied), ("attend_copied", copied))
        self.loops = [function(name, *shape.kind) for name, count in needed if count]
        enough = products * num_heads * size >= machine.MIN_PARALLEL_WORK
        self.threads = min(num_threads(), self.num_items) if enough else 1

        # The query, scaled, with a block more, for the last one may be read beyond its heads; partial results; threads.
        self.part_rows, query_rows = part_tokens * num_heads, num_tokens * num_heads + shape.num_rows
        of_query, of_parts = (_lines(4 * numbers) for numbers in (query_rows * size, self.part_rows * (size + 1)))
        needed_bytes = LINE + of_query + of_parts + self.threads * shape.share
        self.memory = np.empty(needed_bytes, np.uint8) if memory is None or len(memory) < needed_bytes else memory
        self.query = -(-address(self.memory) // LINE) * LINE
        first = self.query - address(self.memory)
        query = self.memory[first : first + query_rows * size * 4].view(FLOAT)
        query[num_tokens * num_heads * size :] = 0
        self.scaled = query[: num_tokens * num_heads * size].reshape(call.query.shape)
        parts = self.query + of_query
        self.parts = parts, parts + self.part_rows * size * 4
        self.scratch = parts + of_parts

        heads = num_heads, num_kv_heads, shape.num_rows
        plain = variant.alibi_slopes is None
        slopes = shape.no_slopes if plain else _in_lanes(variant.alibi_slopes, 0.0, *heads)
        sinks = shape.no_sinks if variant.sinks is None else _in_lanes(variant.sinks, -np.inf, *heads)
        sizes = shape.sizes.copy()
        for field, value in (
            (0, self.num_items),
            (7, window),
            (9, table.shape[1]),
            (12, plain and not variant.softcap),
        ):
            sizes[field] = value  # cpu_loop.py names them
        self.counters = np.zeros(2, INT)
        self.first = self.items, address(sizes), variant.softcap or 0.0, self.query
        self.last = address(table), address(slopes), address(sinks)
        self._kept = found, table, slopes, sinks, sizes

    def run(self, call: AttentionCall, out: np.ndarray, lse: np.ndarray) -> None:
        """Fill `out` and `lse`, float32 in one piece, by this step's threads."""
        np.multiply(decode(call.query), FLOAT(call.scale), dtype=FLOAT, out=self.scaled)
        if call.variant is not None and call.variant.key_scales is not None:  # factors of all of a head's scores
            group_size = call.query.shape[1] // len(call.variant.key_scales)
            self.scaled *= np.repeat(call.variant.key_scales, group_size)[:, None]
        given = (*self.first, address(call.keys), address(call.values), *self.last)
        results = address(out), address(lse)
        counters, self.counters[:] = address(self.counters), 0

        # The loop has addresses. After Ctrl-C other threads finish their items: what lies there must outlive this call.
        def share(mine: int, threads: int, alive: object = (self, call, out, lse)) -> None:
            scratch = self.scratch + mine * self.shape.share
            of_thread = scratch, scratch + self.shape.floats * 4
            for number, loop in enumerate(self.loops):
                loop(counters + 8 * number, *given, *of_thread, *results, *self.parts)

        in_threads(share, self.threads)
        if self.part_rows:
            function("merge")(self.items, self.num_items, *call.query.shape[1:], *self.parts, *results)


def _lines(size: int) -> int:
    """The next multiple of a cache line, in bytes."""
    return -(-size // LINE) * LINE


def _packed(call: AttentionCall) -> AttentionCall:
    """The call on a copy of its keys and values: contiguous, in float32, filled up with zeros to whole vectors."""
    addresses, size = call.addresses, call.query.shape[2]
    lens = addresses.seq_lens.astype(INT)
    starts = np.cumsum(lens) - lens
    owner = np.repeat(np.arange(len(lens)), lens)
    position = np.arange(len(owner)) - starts[owner]
    if addresses.block_tables is not None:
        block, slot = np.divmod(position, call.keys.shape[1])
        where: Any = addresses.block_tables[owner, block], slot
    else:
        assert addresses.starts is not None
        where = addresses.starts[owner] + position

    def filled(array: np.ndarray) -> np.ndarray:
        result = np.zeros((*array.shape[:2], -(-size // LANES) * LANES), FLOAT)
        result[:, :, :size] = decode(array)
        return result

    query, keys, values = filled(call.query), filled(call.keys[where]), filled(call.values[where])
    at_starts = replace(addresses, block_tables=None, starts=starts)
    return replace(call, query=query, keys=keys, values=values, addresses=at_starts, out=np.empty_like(query))


def _in_lanes(
    numbers: np.ndarray | None, absent: float, num_heads: int, num_kv_heads: int, num_rows: int
) -> np.ndarray:
    """A number of each head, as the loop has them: for each block of R heads a vector, in which the R repeat."""
    group_size = num_heads // num_kv_heads
    blocks = -(-group_size // num_rows)
    if numbers is None:
        return np.full((num_kv_heads * blocks, LANES), absent, FLOAT)
    result = np.full((num_kv_heads, blocks * num_rows), absent, FLOAT)
    result[:, :group_size] = numbers.reshape(num_kv_heads, group_size)
    return np.tile(result.reshape(-1, num_rows), LANES // num_rows)
