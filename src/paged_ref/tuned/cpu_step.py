"""The work of a step on a CPU: its addresses as compiled code reads them, its items, and its threads' memory.

What calls with the same shapes have in common is made once for the process (Shape), and what the layers of a step have
in common once for the step (Step). Python between two kernels starts with cold caches, so what is not done is what
counts.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..core.attention.attention import Addresses, AttentionCall
from ..extras.formats import BFLOAT16, FLOAT8
from ..extras.variants import PLAIN
from . import cpu_machine as machine
from .cpu_code import function
from .cpu_machine import LANES, TILE
from .halves import widened
from .host_arrays import address, in_lines, whole_lines
from .threads import in_threads, num_threads

FLOAT, INT = np.float32, np.int64
NO_LIMIT = 1 << 40  # a window or a block that holds every sequence

# The loop's loads know a format by the type of its numbers. float16 goes as its bits, and bfloat16 as another type.
_TYPES = {
    np.dtype(np.float32): "float32", np.dtype(np.float16): "uint16", BFLOAT16: "int16", np.dtype(np.int8): "int8",
    FLOAT8: "uint8",
}  # fmt: skip

last = threading.local()  # .step, .read: those of this thread's last call


class Read(NamedTuple):
    """The addresses of a step, as the compiled code has them."""

    addresses: Addresses
    whole: np.ndarray  # int64: cpu_items.read_addresses says how
    in_bounds: bool
    num_keys: int  # the sum of the sequences' lengths


def read_once(addresses: Addresses, num_tokens: int, num_blocks: int, block_size: int) -> Read:
    """The addresses as compiled code reads them. Those of the last call are kept, for all layers of a step."""
    read: Read | None = getattr(last, "read", None)
    if read is None or read.addresses is not addresses:
        num_seqs, table = len(addresses.seq_lens), addresses.block_tables
        if table is None:  # a contiguous region is one block for everything, which begins at the region's first slot
            assert addresses.starts is not None
            table, max_blocks, block_size = addresses.starts, 1, NO_LIMIT
        else:
            max_blocks = table.shape[1]
        given = [_plain_integers(array) for array in (addresses.seq_lens, addresses.query_start_loc, table)]
        found, whole = np.empty(2, INT), np.empty(2 * num_seqs + 1 + num_seqs * max_blocks, INT)
        places = [number for array in given for number in (address(array), array.itemsize)]
        sizes = given[2].strides[0] // given[2].itemsize, num_seqs, max_blocks, num_tokens, num_blocks, block_size
        is_contiguous = addresses.block_tables is None
        function("read_addresses")(address(found), address(whole), *places, *sizes, is_contiguous)
        wrong, num_keys = found.tolist()
        read = last.read = Read(addresses, whole, not wrong, num_keys)
    return read


def _plain_integers(array: np.ndarray) -> np.ndarray:
    """The array as the compiled code can read it: int32 or int64, a row in one piece."""
    *steps, step = array.strides  # of a field of a structured array, rows need not be whole numbers apart
    whole = step == array.itemsize and not any(other % array.itemsize for other in steps)
    return array if whole and array.dtype.kind == "i" and array.itemsize in (4, 8) else np.ascontiguousarray(array, INT)


class Shape:
    """What calls with the same shapes and strides have in common."""

    def __init__(
        self, num_heads: int, size: int, dtype: np.dtype[Any], cache_shape: tuple[int, ...], *strides: tuple[int, ...]
    ) -> None:
        """`cache_shape`: of the keys, but for the number of blocks or slots. `strides`: of keys and of values."""
        num_kv_heads, itemsize = cache_shape[-2], dtype.itemsize
        whole = not any(stride % itemsize for of_cache in strides for stride in of_cache)
        self.in_vectors = whole and size % LANES == 0 and all(of_cache[-1] == itemsize for of_cache in strides)
        num_rows, num_columns = machine.block_of(num_heads // num_kv_heads, size)
        self.num_rows, self.kind = num_rows, (_TYPES[dtype], num_rows, num_columns)
        token_blocks = -(-num_heads // num_kv_heads // num_rows)  # of a token and a KV head
        # The most queries of an item: of all KV heads, and of one.
        self.queries = max(1, machine.ITEM_ROWS // (num_kv_heads * token_blocks * num_rows))
        self.head_queries = max(1, machine.ITEM_ROWS // (token_blocks * num_rows))
        item_blocks = token_blocks * max(num_kv_heads * self.queries, self.head_queries)
        # Numbers of memory for each thread: cpu_loop.state_of with a tile's K and V, then int64 places of rows.
        self.floats = item_blocks * (num_rows * (2 * size + TILE) + 2 * LANES) + 2 * TILE * size
        self.share = whole_lines(self.floats + 4 * TILE * 2)
        # No scale is 1, no slope is 0, and no sink is -inf: the loop has no branch for them.
        self.no_scales = np.ones(num_kv_heads, FLOAT)
        self.no_slopes, self.no_sinks = (
            _in_lanes(None, absent, num_heads, num_kv_heads, num_rows) for absent in (0.0, -np.inf)
        )
        passes = machine.passes_of(num_kv_heads * size * itemsize, size * itemsize, num_rows * num_columns)
        self.block_size = NO_LIMIT if len(cache_shape) == 2 else cache_shape[0]
        # From a block, a slot, a head to the next. A contiguous region's slots are its tokens.
        steps = [stride // itemsize for of_cache in strides for stride in (of_cache[0], *of_cache[-3:-1])]
        heads = num_heads, num_heads // num_kv_heads, size
        self.sizes = *heads, token_blocks, item_blocks, self.block_size, *passes, *steps  # cpu_loop.py names them


make_shape = lru_cache(maxsize=64)(Shape)


class Step:
    """What calls for the layers of a step have in common: the work, cut into items, and memory for the loop's threads.
    The first call makes it, and the others find all made but their own arrays."""

    def __init__(self, call: AttentionCall, shape: Shape, key: tuple[Any, ...], memory: np.ndarray | None) -> None:
        """`memory`: of the step before, used again where it is large enough."""
        self.key, self._alive = key, (call.addresses, call.variant)  # so that their ids stay theirs
        self.shape, variant = shape, call.variant or PLAIN
        num_tokens, num_heads, size = call.query.shape
        num_kv_heads, num_seqs = call.keys.shape[-2], len(call.addresses.seq_lens)
        window = min(call.window or NO_LIMIT, NO_LIMIT)
        read = read_once(call.addresses, num_tokens, len(call.keys), shape.block_size)
        of_long = num_tokens * num_kv_heads // shape.head_queries  # items of long sequences, but for each one's last
        most = read.num_keys // machine.PART_KEYS + of_long + (1 + num_kv_heads) * num_seqs
        found = np.empty(4 + most * machine.FIELDS, INT)
        self.items = address(found) + 4 * found.itemsize
        copied_from = machine.MIN_COPIED_WORK // (num_heads * size)
        sizes = num_seqs, num_kv_heads, window, shape.queries, shape.head_queries, copied_from
        function("plan")(address(found), self.items, address(read.whole), *sizes)
        self.num_items, part_tokens, products, copied = found[:4].tolist()  # products: of queries and keys, for a head
        needed = (("attend_in_place", self.num_items - copied), ("attend_copied", copied))
        self.loops = [function(name, *shape.kind) for name, count in needed if count]
        enough = products * num_heads * size >= machine.MIN_PARALLEL_WORK
        self.threads = min(num_threads(), self.num_items) if enough else 1

        self.part_rows = part_tokens * num_heads
        of_parts = whole_lines(self.part_rows * (size + 1))
        numbers = of_parts + self.threads * shape.share
        self.memory = in_lines(1, numbers) if memory is None or memory.size < numbers else memory
        parts = address(self.memory)
        self.parts, self.scratch = (parts, parts + self.part_rows * size * 4), parts + of_parts * 4

        heads = num_heads, num_kv_heads, shape.num_rows
        slopes = shape.no_slopes if variant.alibi_slopes is None else _in_lanes(variant.alibi_slopes, 0.0, *heads)
        sinks = shape.no_sinks if variant.sinks is None else _in_lanes(variant.sinks, -np.inf, *heads)
        scales = shape.no_scales if variant.key_scales is None else np.ascontiguousarray(variant.key_scales, FLOAT)
        max_blocks = 1 if call.addresses.block_tables is None else call.addresses.block_tables.shape[1]
        plain = variant.alibi_slopes is None and not variant.softcap
        self._sizes = np.array((self.num_items, window, max_blocks, plain, *shape.sizes), INT)
        self.counters = np.zeros(2, INT)
        self.first = self.items, address(self._sizes), variant.softcap or 0.0
        table = address(read.whole) + (2 * num_seqs + 1) * read.whole.itemsize
        self.last = table, address(scales), address(slopes), address(sinks)
        self._kept = found, read, scales, slopes, sinks

    def run(self, call: AttentionCall, out: np.ndarray, lse: np.ndarray) -> None:
        """Fill `out` and `lse`, float32 in one piece, by this step's threads."""
        query = widened(call.query)
        given = (*self.first, float(call.scale), address(query), address(call.keys), address(call.values), *self.last)
        results = address(out), address(lse)
        counters, self.counters[:] = address(self.counters), 0

        # The loop has addresses. After Ctrl-C other threads finish their items: what lies there must outlive this call.
        def share(mine: int, threads: int, alive: object = (self, call, query, out, lse)) -> None:
            scratch = self.scratch + mine * self.shape.share * 4
            of_thread = scratch, scratch + self.shape.floats * 4
            for number, loop in enumerate(self.loops):
                loop(counters + 8 * number, *given, *of_thread, *results, *self.parts)

        in_threads(share, self.threads)
        if self.part_rows:
            function("merge")(self.items, self.num_items, *call.query.shape[1:], *self.parts, *results)


def _in_lanes(
    numbers: np.ndarray | None, absent: float, num_heads: int, num_kv_heads: int, num_rows: int
) -> np.ndarray:
    """A number of each head, as the loop has them: for each block of R heads a vector, in which the R repeat."""
    group_size = num_heads // num_kv_heads
    blocks = -(-group_size // num_rows)
    result = np.full((num_kv_heads, blocks * num_rows), absent, FLOAT)
    if numbers is not None:
        result[:, :group_size] = numbers.reshape(num_kv_heads, group_size)
    return np.tile(result.reshape(-1, num_rows), LANES // num_rows)
