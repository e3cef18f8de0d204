"""K and V of a shape, and the calls that attend to them: in blocks, and as the contiguous twin of the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..core.device import Array
from ..extras.formats import decode, encode
from ..kernels import naive_attention, paged_attention
from .shapes import Shape

Call = Callable[[], Any]


class Batch:
    """A shape's queries, and `count` sets of K and V, each with a permuted block table, as after long use.

    `query [batch * query_len, num_heads, head_size]`; `keys, values [count, slots, num_kv_heads, head_size]`, which
    are `key_cache, value_cache [count, blocks, block_size, num_kv_heads, head_size]`; `tables [count, batch, blocks]`.
    """

    def __init__(self, shape: Shape, xp: Any, count: int = 1) -> None:
        """`xp` is NumPy or CuPy: whose arrays these are."""
        num_heads, num_kv_heads, head_size = shape.heads
        rng = np.random.default_rng(0)
        self.shape, self.count, self._xp = shape, count, xp
        blocks = -(-shape.keys // shape.block_size)
        rows = (count, shape.batch * blocks * shape.block_size, num_kv_heads, head_size)
        self.keys, self.values = (_random(rng, rows, shape.array_dtype, xp) for _ in range(2))
        in_blocks = (count, shape.batch * blocks, shape.block_size, num_kv_heads, head_size)
        self.key_cache, self.value_cache = self.keys.reshape(in_blocks), self.values.reshape(in_blocks)
        tables = [rng.permutation(shape.batch * blocks).reshape(shape.batch, blocks) for _ in range(count)]
        self.tables = xp.asarray(np.stack(tables).astype(np.int32))
        self.starts = xp.arange(shape.batch, dtype=np.int32) * (blocks * shape.block_size)
        self.seq_lens = xp.asarray(shape.seq_lens())
        self.loc = xp.arange(shape.batch + 1, dtype=np.int32) * shape.query_len  # given, so that no call makes it
        query = rng.standard_normal((shape.batch * shape.query_len, num_heads, head_size), np.float32)
        self.query = xp.asarray(encode(query, shape.array_dtype))
        self.out: Array | None = None  # where all answers go; None: each call makes its own array

    def paged(self, backend: str, tables: Sequence[Array] | None = None) -> list[Call]:
        """A call for each set."""
        return [
            partial(
                paged_attention, self.query, keys, values, table, self.seq_lens, self.loc, out=self.out, backend=backend
            )
            for keys, values, table in zip(self.key_cache, self.value_cache, tables or self.tables, strict=True)
        ]

    def contiguous(self, backend: str) -> list[Call]:
        """A call for each set."""
        return [
            partial(
                naive_attention, self.query, keys, values, self.starts, self.seq_lens, self.loc, out=self.out,
                backend=backend,
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]  # fmt: skip

    def check(self, backend: str) -> None:
        """Two sequences against the reference, and all against the contiguous twin. Raises RuntimeError."""
        num_seqs = min(2, self.shape.batch)
        last = slice(-num_seqs * self.shape.query_len, None)
        if self.out is not None:
            self.out[...] = 0
        got = self.paged(backend)[-1]()[last].copy()
        want = paged_attention(
            self.query[last], self.key_cache[-1], self.value_cache[-1], self.tables[-1, -num_seqs:],
            self.seq_lens[-num_seqs:], self.loc[: num_seqs + 1], backend="reference",
        )  # fmt: skip
        in_order = self._xp.arange(self.tables[0].size, dtype=np.int32).reshape(self.tables.shape[1:])
        paged = self.paged(backend, [in_order] * self.count)[0]().copy()
        for what, a, b in (("the reference", got, want), ("the contiguous twin", paged, self.contiguous(backend)[0]())):
            difference = float(abs(decode(a).astype(np.float32) - decode(b).astype(np.float32)).max())
            if not difference < self.shape.tolerance:
                raise RuntimeError(f"{backend} is off from {what} by {difference} on {self.shape}")


def _random(rng: np.random.Generator, rows: tuple[int, ...], dtype: np.dtype[Any], xp: Any) -> Array:
    """Random numbers: up to 16 Mi of them drawn here, repeated to the end."""
    cache = xp.empty(rows, dtype=dtype)
    flat = cache.reshape(-1)
    drawn = xp.asarray(encode(rng.standard_normal(min(flat.size, 1 << 24), np.float32), dtype))
    for at in range(0, flat.size, drawn.size):
        flat[at : at + drawn.size] = drawn[: flat.size - at]
    return cache
