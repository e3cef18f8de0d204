"""The small attention call that the walk goes through, run by both teaching kernels in the tracer.

The two kernels get the same queries, keys and values; the naive kernel finds them in a region for each sequence, the
paged kernel in blocks. Both make the same accesses in the same order, so one position (the number of an access) stands
for the same moment in both runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import naive_attention, paged_attention
from ...tracer import trace
from .kernel_run import KernelRun
from .sizes import Sizes
from .source import compared, lines_of_kernel

Array = np.ndarray[Any, Any]
KERNELS = ("naive", "paged")


@dataclass(frozen=True, slots=True)
class Walk:
    """Both runs. `runs["naive"]` and `runs["paged"]` go in step."""

    sizes: Sizes
    runs: dict[str, KernelRun]

    def __len__(self) -> int:
        return len(self.runs["paged"])


def walk(sizes: Sizes | None = None) -> Walk:
    """Run both kernels on the same sequences. Raises ValueError where the sizes are out of bounds."""
    sizes = sizes or Sizes()
    sizes.check()
    rng = np.random.default_rng(sizes.seed)
    block_size = sizes.block_size
    needed = [-(-count // block_size) for count in sizes.tokens]  # blocks of each sequence
    region = max(needed)  # standard memory reserves the same for every sequence: here the longest
    shape = (len(needed) * region, block_size, sizes.num_kv_heads, sizes.head_size)

    free = iter(rng.permutation(shape[0]).tolist())
    tables = tuple(tuple(next(free) for _ in range(count)) for count in needed)
    starts = tuple((seq * region * block_size,) for seq in range(len(needed)))
    kv = [rng.standard_normal((2, count, *shape[2:])).astype(sizes.dtype) for count in sizes.tokens]
    query = rng.standard_normal((len(needed), sizes.num_heads, sizes.head_size)).astype(sizes.dtype)
    naive: list[Sequence[int]] = [range(first, first + region * block_size) for (first,) in starts]
    paged: list[Sequence[int]] = [
        [block * block_size + i for block in table for i in range(block_size)] for table in tables
    ]
    naive_kv, paged_kv = _filled(shape, naive, kv), _filled(shape, paged, kv)

    block_tables = np.full((len(needed), region), -1, dtype=np.int32)  # -1: padding, never followed
    for seq, table in enumerate(tables):
        block_tables[seq, : len(table)] = table
    seq_lens = np.array(sizes.tokens, dtype=np.int32)
    first_slots = np.array(starts, dtype=np.int32)[:, 0]
    with trace.recording(sizes.num_threads) as traces:
        keys, values = naive_kv.reshape(2, -1, *shape[2:])  # [num_slots, num_kv_heads, head_size]
        naive_attention(query, keys, values, first_slots, seq_lens, backend="trace")
        paged_attention(query, paged_kv[0], paged_kv[1], block_tables, seq_lens, backend="trace")
    sources = [inspect.getsourcelines(each.function) for each in traces]
    runs = {}
    for i, (name, slots, table) in enumerate(zip(KERNELS, (naive, paged), (starts, tables), strict=True)):
        code = compared(name, sources[i], sources[1 - i])
        owner = _owner(slots, sizes.tokens)
        runs[name] = KernelRun(name, sizes, traces[i], code, owner, table, shape, lines_of_kernel(traces[i]))
    return Walk(sizes, runs)


def _filled(shape: tuple[int, int, int, int], slots: Sequence[Sequence[int]], kv: Sequence[Array]) -> Array:
    """[2, *shape]: K and V of each sequence in the first of its `slots`; the other slots stay NaN.

    `kv` has [2, num_tokens, num_kv_heads, head_size] for each sequence. A kernel that reads an empty slot computes NaN.
    """
    caches = np.full((2, *shape), np.nan, dtype=kv[0].dtype)
    for of_seq, of_tokens in zip(slots, kv, strict=True):
        caches.reshape(2, -1, *shape[2:])[:, of_seq[: of_tokens.shape[1]]] = of_tokens
    return caches


def _owner(slots: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[int, tuple[int, int | None]]:
    """Slot -> (sequence, position; None: allocated and empty)."""
    return {
        slot: (seq, position if position < length else None)
        for seq, (of_seq, length) in enumerate(zip(slots, lengths, strict=True))
        for position, slot in enumerate(of_seq)
    }
