"""The KV cache on a GPU: swaps beside the computation, and kernels that move K and V."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.attention.attention import Addresses, AttentionCall, attend
from ..core.device import Array, module_of
from ..core.memory.kv import KVCache
from ..core.memory.manager import Transfer
from ..extras.formatted_kv import FormattedKV
from . import fused, store
from .copies import CopyStream, pinned


class TunedKV(KVCache):
    """A KVCache that swaps on a stream of its own, and writes and copies with one kernel each.

    Swaps run straight between the device and page-locked host memory. A swap begins when all work before it is done,
    and work after it begins when the swap is done, so that no block is reused before its copy. The host does not wait;
    call `synchronize` before reading `host`.
    """

    def __init__(self, *sizes: Any, **options: Any) -> None:
        """The arguments of KVCache."""
        super().__init__(*sizes, **options)
        self.copies = CopyStream()

    def synchronize(self) -> None:
        """Make the host wait for all swaps."""
        self.copies.synchronize()

    def _host_array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return pinned(shape, dtype, self.nan)

    def turn_and_attend(
        self, layer: int, qk: Array, value: Array, cos: Array, sin: Array, addresses: Addresses, window: int | None
    ) -> Array:
        """RoPE, then `attend`, for `qk [num_tokens, num_heads + num_kv_heads, head_size]` before RoPE: one kernel turns
        queries and keys and writes K and V."""
        query = fused.turn_and_write(qk, value, cos, sin, *self.slots[layer], addresses.slot_mapping)
        keys, values = (self.slots if addresses.block_tables is None else self.layers)[layer]
        out, variant = module_of(query).empty(query.shape, query.dtype), self.variants[layer]
        attend(AttentionCall(query, keys, values, addresses, self.scale, window, out, variant=variant), self.backend)
        return out

    def _write(self, layer: int, key: Array, value: Array, slot_mapping: Array) -> None:
        if not store.write(key, value, *self.layers[layer], slot_mapping):
            super()._write(layer, key, value, slot_mapping)

    def _copy(self, sources: np.ndarray, destinations: np.ndarray) -> None:
        if not store.copy(_planes(self.device), np.stack([sources, destinations], axis=1)):
            super()._copy(sources, destinations)

    def _apply_batch(self, batch: Sequence[Transfer]) -> None:
        if batch[0].kind not in ("swap_out", "swap_in"):
            super()._apply_batch(batch)
            return
        self.copies.swap(batch, _planes(self.device), _planes(self.host))
        self.copies.wait()


class TunedFormattedKV(FormattedKV, TunedKV):
    """A FormattedKV that swaps and copies as TunedKV does. Array code writes, since it measures the scales."""


def _planes(cache: Array) -> Array:
    """The cache as [num_layers * 2, num_blocks, block_size, num_kv_heads, head_size]: a plane is K or V of a layer."""
    return cache.reshape(-1, *cache.shape[2:])
