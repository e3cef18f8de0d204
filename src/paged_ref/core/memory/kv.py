"""The K and V themselves, for all layers: the only place that moves them between blocks, or off the device.

One array on the device and one on the host hold everything. A manager that does without blocks has blocks
of one slot.

On a GPU, swaps run on a stream of their own, straight between the two arrays. Events keep the order: a swap
begins when all work before it is done, and work after it begins when the swap is done, so that no block is
reused before its copy. The host waits for none of this; who reads `host` calls synchronize() first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..attention.write import copy_planes
from ..device import Array, on_gpu, xp
from .manager import Transfer

MAX_PITCH = 2**31 - 1  # bytes from row to row that cudaMemcpy2D takes (cudaDeviceProp::memPitch)


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
        self._swaps: Any = xp.cuda.Stream(non_blocking=True) if on_gpu else None

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
        kind = batch[0].kind
        if kind in ("swap_out", "swap_in") and self._swaps is not None:
            self._swap_beside(batch)
            return
        sources = np.concatenate([np.arange(t.source, t.source + t.count) for t in batch])
        destinations = np.concatenate([np.arange(t.destination, t.destination + t.count) for t in batch])
        if kind == "swap_out":
            self.host[:, :, destinations] = self.device[:, :, sources]
        elif kind == "swap_in":
            self.device[:, :, destinations] = self.host[:, :, sources]
        else:
            planes = self.device.reshape(-1, *self.device.shape[2:])  # [num_layers * 2, num_blocks, ...]
            copy_planes(planes, np.stack([sources, destinations], axis=1))

    def _swap_beside(self, batch: Sequence[Transfer]) -> None:
        """Between device and pinned host memory, on the stream for swaps."""
        compute, swaps = xp.cuda.get_current_stream(), self._swaps
        swaps.wait_event(compute.record(xp.cuda.Event(disable_timing=True)))
        runtime, height = xp.cuda.runtime, self.device.shape[0] * 2
        for transfer in batch:
            if transfer.kind == "swap_out":
                source, target, direction = self.device, self.host, runtime.memcpyDeviceToHost
            else:
                source, target, direction = self.host, self.device, runtime.memcpyHostToDevice
            at, pitch, width = _run(source, transfer.source, transfer.count)
            to, target_pitch, _ = _run(target, transfer.destination, transfer.count)
            rows = height if max(pitch, target_pitch) <= MAX_PITCH else 1  # a row: these blocks in one K or V
            for row in range(0, height, rows):
                runtime.memcpy2DAsync(
                    to + row * target_pitch, target_pitch, at + row * pitch, pitch, width, rows, direction, swaps.ptr
                )
        compute.wait_event(swaps.record(xp.cuda.Event(disable_timing=True)))

    def synchronize(self) -> None:
        """Wait until all swaps are done. Call before reading `host`."""
        if self._swaps is not None:
            self._swaps.synchronize()

    def poison_slots(self, slots: np.ndarray) -> None:
        """Fill these slots with NaN: whoever reads them now reads what is no longer there."""
        block_size = self.device.shape[3]
        self.device[:, :, xp.asarray(slots // block_size), xp.asarray(slots % block_size)] = np.nan


def _run(pool: Array, block: int, count: int) -> tuple[int, int, int]:
    """Blocks `block` to `block + count` of a pool: their address in the first layer's K, the bytes from there to
    the same blocks in the V, in the next layer's K and so on, and their length in bytes."""
    address = pool.ctypes.data if isinstance(pool, np.ndarray) else pool.data.ptr
    return address + block * pool.strides[2], pool.strides[1], count * pool.strides[2]


def pinned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Host memory full of NaN; page-locked where there is a GPU, since only then is a copy fast."""
    if not on_gpu:
        return np.full(shape, np.nan, dtype=dtype)
    import cupyx

    host: np.ndarray = cupyx.empty_pinned(shape, dtype=dtype)
    host.fill(np.nan)
    return host
