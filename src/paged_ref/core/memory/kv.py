"""The K and V themselves, for all layers: where a step writes them, and where attention reads them.

One array on the device and one on the host hold everything. A manager without blocks has blocks of one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from ..attention.attention import Addresses, AttentionCall, attend, by_slot
from ..device import Array, to_host, xp
from ..engine.scheduler import StepPlan
from ..model.llama import AttendingKV, StepInputs
from .manager import Transfer


class KV(AttendingKV, Protocol):
    """K and V of all layers: what the engine asks of memory, and what the model does."""

    def begin_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        """Before the forward pass: carry out the plan's transfers. `inputs` still lie in host memory."""


class KVCache:
    """K and V of `num_blocks * block_size` tokens. Every slot starts as NaN, so that a stray read shows."""

    nan: float = np.nan  # as the cache stores it

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: str,
        num_host_blocks: int = 0,
        backend: str = "auto",
    ) -> None:
        self.block_size = block_size
        self.backend = backend
        self.scale = head_size**-0.5
        self.variants: list[Any] = [None] * num_layers  # what attention over a layer needs beyond the plain one
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_size)
        self.device = xp.full(shape, self.nan, dtype=dtype)
        # (key_cache, value_cache) of each layer, [num_blocks, block_size, num_kv_heads, head_size]
        self.layers: list[tuple[Array, Array]] = [(kv[0], kv[1]) for kv in self.device]
        # The same memory without blocks, [num_slots, num_kv_heads, head_size]
        self.slots = [(by_slot(keys), by_slot(values)) for keys, values in self.layers]
        self.host = self._host_array((num_layers, 2, num_host_blocks, *shape[3:]), dtype)

    def _host_array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Host memory full of NaN."""
        return np.full(shape, self.nan, dtype=dtype)

    # --- a step --------------------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        inputs.addresses.check(len(inputs.token_ids), self.device.shape[2], self.block_size)
        self.apply(plan.transfers)

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, addresses: Addresses, window: int | None
    ) -> Array:
        self._write(layer, key, value, addresses.slot_mapping)
        keys, values = (self.slots if addresses.block_tables is None else self.layers)[layer]
        out = xp.empty_like(query)
        call = AttentionCall(query, keys, values, addresses, self.scale, window, out, variant=self.variants[layer])
        attend(call, self.backend)
        return call.out

    def _write(self, layer: int, key: Array, value: Array, slot_mapping: Array) -> None:
        """Write K and V of the step's tokens into their slots. vLLM calls this reshape_and_cache."""
        keys, values = self.slots[layer]
        keys[slot_mapping], values[slot_mapping] = key, value

    # --- transfers -----------------------------------------------------------------------------------

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
        """Transfers of one kind, none of which reads or writes what another one writes."""
        sources = np.concatenate([np.arange(t.source, t.source + t.count) for t in batch])
        destinations = np.concatenate([np.arange(t.destination, t.destination + t.count) for t in batch])
        if batch[0].kind == "swap_out":
            self.host[:, :, destinations] = to_host(self.device[:, :, sources])
        elif batch[0].kind == "swap_in":
            self.device[:, :, destinations] = xp.asarray(self.host[:, :, sources])
        else:
            self._copy(sources, destinations)

    def _copy(self, sources: np.ndarray, destinations: np.ndarray) -> None:
        """Copy blocks on the device, in all layers. All sources are read before a destination is written."""
        self.device[:, :, xp.asarray(destinations)] = self.device[:, :, xp.asarray(sources)]
