"""The K and V themselves, for all layers: the only place that moves them between blocks.

One array holds everything. A manager that does without blocks has blocks of one slot.
"""

from __future__ import annotations

from ..device import Array, xp
from ..kernels.store import copy_blocks
from .managers import BlockCopy


class KVStorage:
    """K and V of `num_blocks * block_size` tokens. Every slot starts as NaN, so that a stray read shows."""

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_size)
        self._kv = xp.full(shape, xp.nan, dtype=dtype)
        # (key_cache, value_cache) of each layer, [num_blocks, block_size, num_kv_heads, head_size]
        self.layers: list[tuple[Array, Array]] = [(kv[0], kv[1]) for kv in self._kv]

    @property
    def num_bytes(self) -> int:
        return int(self._kv.nbytes)

    def apply(self, copies: list[BlockCopy]) -> None:
        """Carry out this step's block copies, before anything is written."""
        pairs = [(copy.source, copy.destination) for copy in copies]
        for key_cache, value_cache in self.layers:
            copy_blocks(key_cache, value_cache, pairs)
