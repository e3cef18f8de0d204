"""Calls of plain attention for the core's backends, with the oracle's answer. What must not be read is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paged_ref.core.attention.attention import Addresses, AttentionCall
from support import oracle

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class PlainCall:
    """A call and what it must answer, in float64."""

    call: AttentionCall
    output: Array
    lse: Array


def plain_call(
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    *,
    heads: tuple[int, int, int] = (4, 2, 8),
    block_size: int = 4,
    window: int | None = None,
    scale: float | None = None,
    dtype: str = "float32",
    paged: bool = True,
    want_lse: bool = True,
) -> PlainCall:
    """Random numbers in blocks from all over the cache, or in one region for each sequence."""
    rng = np.random.default_rng(sum(seq_lens) + len(seq_lens))
    num_heads, num_kv_heads, head_size = heads
    query_lens = [1] * len(seq_lens) if query_lens is None else query_lens
    query = rng.standard_normal((sum(query_lens), num_heads, head_size)).astype(dtype)
    row = (num_kv_heads, head_size)
    keys, values = ([rng.standard_normal((length, *row)).astype(dtype) for length in seq_lens] for _ in range(2))
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 3
    order = rng.permutation(num_blocks) if paged else np.arange(num_blocks)
    tables = np.full((len(seq_lens), max(counts, default=0) + 1), -1, np.int32)
    caches = np.full((2, num_blocks * block_size, *row), np.nan, dtype)
    first = 1  # block
    starts = []
    for s, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        tables[s, :count] = order[first : first + count]
        starts.append(first * block_size)
        for position in range(length):
            slot = tables[s, position // block_size] * block_size + position % block_size
            caches[0, slot], caches[1, slot] = keys[s][position], values[s][position]
        first += count
    loc = np.cumsum([0, *query_lens]).astype(np.int32)
    where: dict[str, Any] = {"block_tables": tables} if paged else {"starts": np.array(starts, np.int32)}
    addresses = Addresses(np.array(seq_lens, np.int32), loc, **where)
    if paged:
        caches = caches.reshape(2, num_blocks, block_size, *row)
    output, lse = oracle.attention(query, keys, values, query_lens, scale=scale, sliding_window=window)
    call = AttentionCall(
        query, caches[0], caches[1], addresses, head_size**-0.5 if scale is None else scale, window,
        np.full(query.shape, np.nan, dtype), np.full(query.shape[:2], np.nan, np.float32) if want_lse else None,
    )  # fmt: skip
    return PlainCall(call, output, lse)


CASES: dict[str, dict[str, Any]] = {
    "decode": {"seq_lens": [5, 17, 33]},
    "prefill": {"seq_lens": [9, 20], "query_lens": [9, 20]},
    "chunks and decodes": {"seq_lens": [9, 20, 6, 41], "query_lens": [1, 4, 6, 1]},
    "no keys": {"seq_lens": [0, 3, 0], "query_lens": [1, 1, 2]},
    "no queries": {"seq_lens": [7, 3], "query_lens": [0, 0]},
    "nothing": {"seq_lens": []},
    "more queries than keys": {"seq_lens": [2, 3, 0], "query_lens": [5, 3, 2]},
    "one head": {"seq_lens": [11, 3], "heads": (1, 1, 16)},
    "groups of three": {"seq_lens": [11, 3], "heads": (6, 2, 5)},
    "one KV head": {"seq_lens": [11, 3], "query_lens": [3, 3], "heads": (7, 1, 64)},
    "blocks of one": {"seq_lens": [11, 3], "block_size": 1},
    "a full block": {"seq_lens": [16, 32, 17], "block_size": 16},
    "window of one": {"seq_lens": [9, 4], "query_lens": [2, 4], "window": 1},
    "window": {"seq_lens": [30, 6], "query_lens": [12, 6], "window": 5},
    "window longer than all": {"seq_lens": [9, 4], "window": 100},
    "scale": {"seq_lens": [9, 4], "scale": 3.0},
    "large scores": {"seq_lens": [40, 17], "scale": 50.0},
}
