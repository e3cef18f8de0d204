"""Backend `cpu-simd`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So contiguous attention runs the same loop with a
table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, which do not depend on the rest of the batch or on the number of threads: a
sequence gets the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding as llvm

from ..core.attention.attention import Addresses, AttentionCall
from ..extras.formats import BFLOAT16, FLOAT8, decode, encode
from ..extras.variants import PLAIN, Variant
from . import cpu_machine as machine
from .cpu_code import address, function, unavailable
from .cpu_machine import LANES, TILE
from .threads import in_threads, num_threads

__all__ = ["attend", "unavailable", "unsupported"]

FLOAT, INT = np.float32, np.int64
NO_LIMIT = 1 << 40  # a window or a block that holds every sequence
NUM_FIELDS = 9  # of an item: cpu_loop.py names them
LINE = 64  # bytes: a vector that begins at a cache line is loaded in one piece


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
    num_heads, size = call.query.shape[1:]
    variant, num_kv_heads = call.variant or PLAIN, call.keys.shape[-2]
    num_rows, num_columns = machine.block_of(num_heads // num_kv_heads, size)
    plan = _Plan(call, num_rows)
    # No slope is 0, and no sink is -inf: the loop has no branch for them.
    slopes = _in_lanes(variant.alibi_slopes, 0.0, num_heads, num_kv_heads, num_rows)
    sinks = _in_lanes(variant.sinks, -np.inf, num_heads, num_kv_heads, num_rows)
    query = _query(call, variant, num_rows)
    direct = call.out.dtype == FLOAT and call.out.flags.c_contiguous
    out = call.out if direct else np.empty(call.query.shape, FLOAT)
    lse = np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse
    part_rows = plan.part_tokens * num_heads
    parts = np.empty(part_rows * (size + 1), FLOAT)

    threads = 1
    if plan.products * num_heads * size >= machine.MIN_PARALLEL_WORK:
        threads = min(num_threads(), plan.num_items)
    # Of each thread: sums and weights, the highest scores and the sums of the weights; then where rows lie.
    floats = plan.item_blocks * (num_rows * (size + TILE) + 2 * LANES)
    step = -(-(floats * FLOAT().itemsize + 4 * TILE * INT().itemsize) // LINE) * LINE
    memory = np.empty(LINE + threads * step, np.uint8)
    counter, scratch = np.zeros(1, INT), -(-address(memory) // LINE) * LINE
    sizes, parts_out = plan.sizes(call, not variant.softcap and variant.alibi_slopes is None), address(parts)
    given = (
        address(counter), plan.items, address(sizes), variant.softcap or 0.0, address(query), address(call.keys),
        address(call.values), address(plan.table), address(slopes), address(sinks),
    )  # fmt: skip
    results = (address(out), address(lse), parts_out, parts_out + part_rows * size * FLOAT().itemsize)
    loop = function("attend_items", _TYPES[call.keys.dtype], num_rows, num_columns)

    # The loop has addresses. After Ctrl-C other threads finish their items, so what lies there must outlive this call.
    held = (call, plan, slopes, sinks, query, out, lse, parts, memory, counter, sizes)

    def share(mine: int, threads: int, held: object = held) -> None:
        its = scratch + mine * step
        loop(*given, its, its + floats * FLOAT().itemsize, *results)

    in_threads(share, threads)
    if part_rows:
        function("merge")(plan.items, plan.num_items, num_heads, size, *results[2:], *results[:2])
    if variant.value_scales is not None:
        out *= np.repeat(variant.value_scales, num_heads // num_kv_heads)[:, None]
    if not direct:
        call.out[...] = encode(out, call.out.dtype)


# The loop's loads know a format by the type of its numbers. float16 goes as its bits, and bfloat16 as another type.
_TYPES = {
    np.dtype(np.float32): "float32", np.dtype(np.float16): "uint16", BFLOAT16: "int16", np.dtype(np.int8): "int8",
    FLOAT8: "uint8",
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
        self.token_blocks = -(-num_heads // num_kv_heads // num_rows)  # of a token and a KV head
        queries = max(1, machine.ITEM_ROWS // (num_kv_heads * self.token_blocks * num_rows))  # of an item
        self.item_blocks = num_kv_heads * self.token_blocks * queries
        seq_lens = np.ascontiguousarray(addresses.seq_lens, INT)
        loc = np.ascontiguousarray(addresses.query_start_loc, INT)
        most_items = int(seq_lens.sum()) // machine.PART_KEYS + num_tokens // queries + 2 * len(seq_lens)
        self._memory = np.empty(3 + most_items * NUM_FIELDS, INT)
        found = address(self._memory)
        self.items = found + 3 * self._memory.itemsize
        function("plan")(found, self.items, address(seq_lens), address(loc), len(seq_lens), self.window, queries)
        # How many items; the rows of partial results; the query-key products of a head
        self.num_items, self.part_tokens, self.products = self._memory[:3].tolist()

    def sizes(self, call: AttentionCall, plain: bool) -> np.ndarray:
        """The numbers of the call, in the order of cpu_loop.py."""
        (_, num_heads, size), num_kv_heads, itemsize = call.query.shape, call.keys.shape[-2], call.keys.itemsize
        # From a block, a slot, a head to the next. A contiguous region's slots are its tokens.
        strides = [
            stride // itemsize
            for cache in (call.keys, call.values)
            for stride in (cache.strides[0], *cache.strides[-3:-1])
        ]
        passes = machine.passes_of(num_kv_heads * size * itemsize, size * itemsize)
        return np.array(
            [self.num_items, num_heads, num_kv_heads, num_heads // num_kv_heads, size, self.token_blocks,
             self.item_blocks, self.window, self.block_size, self.table.shape[1], *passes, plain, *strides], INT,
        )  # fmt: skip


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


def _query(call: AttentionCall, variant: Variant, num_rows: int) -> np.ndarray:
    """The query, scaled, [num_tokens * num_heads + a block, size]: the last block may be read beyond its heads."""
    num_tokens, num_heads, size = call.query.shape
    array = np.empty((num_tokens * num_heads + num_rows, size), FLOAT)
    array[-num_rows:] = 0
    rows = array[:-num_rows].reshape(call.query.shape)
    np.multiply(decode(call.query), FLOAT(call.scale), dtype=FLOAT, out=rows)
    if variant.key_scales is not None:  # a head's scale is a factor of all its scores, so the loop needs no scales
        rows *= np.repeat(variant.key_scales, num_heads // len(variant.key_scales))[:, None]
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
