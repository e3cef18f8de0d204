"""The K and V themselves, for all layers: the only place that moves them between blocks, or off the device.

One array on the device and one on the host hold everything. A manager that does without blocks has blocks
of one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from ..device import Array, on_gpu, to_host, xp
from .managers import Transfer


class KVStorage:
    """K and V of `num_blocks * block_size` tokens. Every slot starts as NaN, so that a stray read shows."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: str,
        num_host_blocks: int = 0,
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_size)
        self.device = xp.full(shape, xp.nan, dtype=dtype)
        # (key_cache, value_cache) of each layer, [num_blocks, block_size, num_kv_heads, head_size]
        self.layers: list[tuple[Array, Array]] = [(kv[0], kv[1]) for kv in self.device]
        self.host = pinned((num_layers, 2, num_host_blocks, *shape[3:]), dtype)

    def apply(self, transfers: Iterable[Transfer]) -> None:
        """Carry out this step's transfers, in their order, before anything is written."""
        batch: list[Transfer] = []
        written: set[int] = set()
        for transfer in transfers:
            sources = range(transfer.source, transfer.source + transfer.count)
            destinations = range(transfer.destination, transfer.destination + transfer.count)
            same_kind = not batch or batch[0].kind == transfer.kind
            # A batch reads all its sources before it writes, so it must not read what it writes.
            if not same_kind or not written.isdisjoint(chain(sources, destinations)):
                self._apply_batch(batch)
                batch, written = [], set()
            batch.append(transfer)
            written.update(destinations)
        if batch:
            self._apply_batch(batch)

    def _apply_batch(self, batch: Sequence[Transfer]) -> None:
        sources = np.concatenate([np.arange(t.source, t.source + t.count) for t in batch])
        destinations = np.concatenate([np.arange(t.destination, t.destination + t.count) for t in batch])
        if batch[0].kind == "swap_out":
            self.host[:, :, destinations] = to_host(self.device[:, :, xp.asarray(sources)])
        elif batch[0].kind == "swap_in":
            self.device[:, :, xp.asarray(destinations)] = xp.asarray(self.host[:, :, sources])
        else:
            self.device[:, :, xp.asarray(destinations)] = self.device[:, :, xp.asarray(sources)]

    def poison_slots(self, slots: np.ndarray) -> None:
        """Fill these slots with NaN: whoever reads them now reads what is no longer there."""
        block_size = self.device.shape[3]
        self.device[:, :, xp.asarray(slots // block_size), xp.asarray(slots % block_size)] = np.nan


class PageStorage(KVStorage):
    """Pages of one layer and one KV head, for sequences longer than the device (streaming.py).

    On a CPU, device and host are two parts of one array, `whole` [1, 2, device and host blocks, ...], so that the
    compiled loop reaches both. On a GPU they are two memories, and `whole` is None.
    """

    def __init__(self, num_device_blocks: int, num_host_blocks: int, block_size: int, head_size: int, dtype: str):
        self.whole: np.ndarray | None = None
        if on_gpu:
            super().__init__(1, num_device_blocks, block_size, 1, head_size, dtype, num_host_blocks)
            return
        super().__init__(1, 1, block_size, 1, head_size, dtype)
        self.whole = np.full((1, 2, num_device_blocks + num_host_blocks, block_size, 1, head_size), np.nan, dtype)
        self.device, self.host = self.whole[:, :, :num_device_blocks], self.whole[:, :, num_device_blocks:]
        self.layers = [(kv[0], kv[1]) for kv in self.device]


def pinned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Host memory full of NaN; page-locked where there is a GPU, since only then is a copy fast."""
    if not on_gpu:
        return np.full(shape, np.nan, dtype=dtype)
    import cupyx

    host: np.ndarray = cupyx.empty_pinned(shape, dtype=dtype)
    host.fill(np.nan)
    return host
