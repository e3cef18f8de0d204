"""Backend `cpu-simd`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So contiguous attention runs the same loop with a
table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, which do not depend on the rest of the batch or on the number of threads: a
sequence gets the same bits in any batch.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
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
    arrays = (addresses.seq_lens, addresses.query_start_loc, addresses.block_tables)
    seq_lens, loc, table = (np.ascontiguousarray(array, INT) for array in arrays)
    wrong, sizes = np.zeros(1, INT), (len(seq_lens), table.shape[1], num_tokens, num_blocks, block_size)
    function("bounds")(address(wrong), address(seq_lens), address(loc), address(table), *sizes)
    return not wrong[0]


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    if call.query.size == 0:
        return
    if not _is_in_vectors(call):
        packed = _packed(call)
        attend(packed)
        call.out[...] = encode(packed.out[:, :, : call.query.shape[2]], call.out.dtype)
        return
    step = getattr(_last, "step", None)
    if step is None or step.key != _key(call):
        step = _Step(call)
    _last.step = None  # if this call is interrupted, other threads finish their items: their memory is not used again
    direct = call.out.dtype == FLOAT and call.out.flags.c_contiguous
    out = call.out if direct else np.empty(call.query.shape, FLOAT)
    step.run(call, out, np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse)
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


_last = threading.local()  # .step: that of the last call


def _key(call: AttentionCall) -> tuple[Any, ...]:
    """Calls with equal keys have a step in common, while its addresses and variant live."""
    keys, ids = call.keys, (id(call.addresses), id(call.variant))
    return (*ids, call.window, call.query.shape, keys.dtype, keys.shape, keys.strides, call.values.strides)


class _Step:
    """What calls for the layers of a step have in common: the work, cut into items, and memory for the loop's threads.
    The first call makes it, and the others find all made but their own arrays."""

    def __init__(self, call: AttentionCall) -> None:
        self.key, self._alive = _key(call), (call.addresses, call.variant)  # so that their ids stay theirs
        num_tokens, num_heads, size = call.query.shape
        addresses, variant, num_kv_heads = call.addresses, call.variant or PLAIN, call.keys.shape[-2]
        self.num_rows, num_columns = machine.block_of(num_heads // num_kv_heads, size)
        if addresses.block_tables is not None:
            table, block_size = np.ascontiguousarray(addresses.block_tables, INT), call.keys.shape[1]
        else:  # one block for everything, which begins at the region's first slot
            table, block_size = np.ascontiguousarray(addresses.starts, INT)[:, None], NO_LIMIT
        window = min(call.window or NO_LIMIT, NO_LIMIT)
        token_blocks = -(-num_heads // num_kv_heads // self.num_rows)  # of a token and a KV head
        queries = max(1, machine.ITEM_ROWS // (num_kv_heads * token_blocks * self.num_rows))  # of an item of all heads
        head_queries = max(1, machine.ITEM_ROWS // (token_blocks * self.num_rows))  # of an item of one
        item_blocks = token_blocks * max(num_kv_heads * queries, head_queries)

        seq_lens = np.ascontiguousarray(addresses.seq_lens, INT)
        loc = np.ascontiguousarray(addresses.query_start_loc, INT)
        most_items = int(seq_lens.sum()) // machine.PART_KEYS + num_tokens // queries + (2 + num_kv_heads) * len(loc)
        found = np.empty(4 + most_items * NUM_FIELDS, INT)
        self.items = address(found) + 4 * found.itemsize
        places = address(found), self.items, address(seq_lens), address(loc)
        function("plan")(*places, len(seq_lens), num_kv_heads, window, queries, head_queries)
        self.num_items, part_tokens, products, copied = found[:4].tolist()  # products: of queries and keys, for a head
        needed = (("attend_in_place", self.num_items - copied), ("attend_copied", copied))
        kind = _TYPES[call.keys.dtype], self.num_rows, num_columns
        self.loops = [function(name, *kind) for name, count in needed if count]
        enough = products * num_heads * size >= machine.MIN_PARALLEL_WORK
        self.threads = min(num_threads(), self.num_items) if enough else 1
        self.part_rows = part_tokens * num_heads
        parts = np.empty(self.part_rows * (size + 1) + 1, FLOAT)  # and one, for an array without numbers has no address
        self.parts = address(parts), address(parts) + self.part_rows * size * parts.itemsize

        # Of each thread: cpu_loop.state_of, a tile's K and V, and where rows lie.
        self.floats = item_blocks * (self.num_rows * (size + TILE) + 2 * LANES) + 2 * TILE * size
        self.share = -(-(self.floats * parts.itemsize + 4 * TILE * found.itemsize) // LINE) * LINE
        memory = np.empty(LINE + self.threads * self.share, np.uint8)
        self.scratch = -(-address(memory) // LINE) * LINE
        # No slope is 0, and no sink is -inf: the loop has no branch for them.
        slopes = _in_lanes(variant.alibi_slopes, 0.0, num_heads, num_kv_heads, self.num_rows)
        sinks = _in_lanes(variant.sinks, -np.inf, num_heads, num_kv_heads, self.num_rows)
        plain, itemsize = not variant.softcap and variant.alibi_slopes is None, call.keys.itemsize
        passes = machine.passes_of(num_kv_heads * size * itemsize, size * itemsize)
        # From a block, a slot, a head to the next. A contiguous region's slots are its tokens.
        strides = [
            stride // itemsize
            for cache in (call.keys, call.values)
            for stride in (cache.strides[0], *cache.strides[-3:-1])
        ]
        sizes = np.array(
            [self.num_items, num_heads, num_kv_heads, num_heads // num_kv_heads, size, token_blocks, item_blocks,
             window, block_size, table.shape[1], *passes, plain, *strides], INT,
        )  # fmt: skip
        self.counters = np.zeros(len(self.loops), INT)
        self.first = self.items, address(sizes), variant.softcap or 0.0
        self.last = address(table), address(slopes), address(sinks)
        self._memory = found, table, parts, memory, slopes, sinks, sizes

    def run(self, call: AttentionCall, out: np.ndarray, lse: np.ndarray) -> None:
        """Fill `out` and `lse`, float32 in one piece, by this step's threads."""
        query = _query(call, self.num_rows)
        given = (*self.first, address(query), address(call.keys), address(call.values), *self.last)
        results = address(out), address(lse)
        self.counters[:] = 0

        # The loop has addresses. After Ctrl-C other threads finish their items: what lies there must outlive this call.
        def share(mine: int, threads: int, alive: object = (self, call, query, out, lse)) -> None:
            scratch = self.scratch + mine * self.share
            for number, loop in enumerate(self.loops):
                counter = address(self.counters) + number * self.counters.itemsize
                loop(counter, *given, scratch, scratch + self.floats * FLOAT().itemsize, *results, *self.parts)

        in_threads(share, self.threads)
        if self.part_rows:
            function("merge")(self.items, self.num_items, *call.query.shape[1:], *self.parts, *results)


def _is_in_vectors(call: AttentionCall) -> bool:
    """Whether the loop can read the caches where they lie: a head's numbers side by side, in whole vectors."""
    return call.query.shape[2] % LANES == 0 and all(
        cache.strides[-1] == cache.itemsize for cache in (call.keys, call.values)
    )


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


def _query(call: AttentionCall, num_rows: int) -> np.ndarray:
    """The query, scaled, [num_tokens * num_heads + a block, size]: the last block may be read beyond its heads."""
    num_tokens, num_heads, size = call.query.shape
    array = np.empty((num_tokens * num_heads + num_rows, size), FLOAT)
    array[-num_rows:] = 0
    rows = array[:-num_rows].reshape(call.query.shape)
    np.multiply(decode(call.query), FLOAT(call.scale), dtype=FLOAT, out=rows)
    if (
        call.variant is not None and call.variant.key_scales is not None
    ):  # a head's scale is a factor of all its scores, so the loop needs no scales
        rows *= np.repeat(call.variant.key_scales, num_heads // len(call.variant.key_scales))[:, None]
    return array


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
