"""The KV sanitizer: every slot remembers who wrote it, and every read is checked before it happens.

What AddressSanitizer is to memory. A slot that no sequence uses is filled with NaN, so that a kernel that
strays shows it; and before attention reads a slot, its owner's record must be of the same position after the
same tokens, and a checksum must find the K and V that the owner wrote, so that a copy which was never made, or
came too late, shows too. Costs time in proportion to the cache: for tests and lessons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ..core.attention.addressing import slot_of
from ..core.device import to_host, xp
from ..core.memory.kv import KVStorage
from ..core.memory.manager import BlockTables, Contiguous, KVCacheManager, Transfer
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..core.memory.swapping import SwappingManager

_UNWRITTEN = -1


class SanitizerError(RuntimeError):
    """A sequence would have read, or has read, what is not its own."""


class _Owners:
    """For each slot: who wrote it, at which position, a fingerprint of all tokens up to there, and a checksum of
    the K and V that it wrote."""

    def __init__(self, num_slots: int) -> None:
        self.writer = np.full(num_slots, _UNWRITTEN, dtype=np.int64)
        self.position = np.full(num_slots, _UNWRITTEN, dtype=np.int64)
        self.fingerprint = np.zeros(num_slots, dtype=np.int64)
        self.checksum = np.zeros(num_slots, dtype=np.uint64)

    def copy(self, source: np.ndarray, other: _Owners, destination: np.ndarray) -> None:
        """Slots `destination` of `other` now hold what slots `source` hold here."""
        other.writer[destination] = self.writer[source]
        other.position[destination] = self.position[source]
        other.fingerprint[destination] = self.fingerprint[source]
        other.checksum[destination] = self.checksum[source]


class KVSanitizer:
    """Watches one manager and its storage. Raises SanitizerError with the block, the reader and the owner."""

    def __init__(self, manager: KVCacheManager, storage: KVStorage) -> None:
        self._manager = manager
        self._storage = storage
        self._unit = int(storage.device.shape[3])  # slots in a row: the block size, or 1
        self._device = _Owners(int(storage.device.shape[2]) * self._unit)
        self._host = _Owners(int(storage.host.shape[2]) * self._unit)
        self._fingerprints: dict[int, list[int]] = {}  # of each sequence, by position
        self._history: dict[int, deque[str]] = {}  # of each row: what happened to it last
        self._written = np.zeros(0, dtype=np.int64)  # slots that the step under way writes

    def before_step(self, transfers: Sequence[Transfer], chunks: Sequence[tuple[int, Sequence[int], int, int]]) -> None:
        """After the step's transfers, before its attention: follow the copies, poison, write, check all reads.

        `chunks` are (sequence, its tokens, how many are computed, how many this step computes).
        """
        for transfer in transfers:
            self._follow(transfer)
        self._poison_unused()
        written = []
        for seq_id, tokens, computed, count in chunks:
            slots = np.array(self._manager.slots(seq_id, computed, count), dtype=np.int64)
            written.append(slots)
            self._device.writer[slots] = seq_id
            self._device.position[slots] = np.arange(computed, computed + count)
            self._device.fingerprint[slots] = self._fingerprint(seq_id, tokens, computed + count)[computed:]
            for row in dict.fromkeys((slots // self._unit).tolist()):
                self._note(row, f"sequence {seq_id} wrote positions {computed} to {computed + count - 1}")
        self._written = np.concatenate(written)
        for seq_id, tokens, computed, count in chunks:
            self._check_owners(seq_id, tokens, computed + count)
            self._check_contents(seq_id, computed)

    def after_step(self, seq_ids: Sequence[int], rows: np.ndarray) -> None:
        """The step's results, one row for each sequence: NaN means that a kernel read a poisoned slot."""
        self._device.checksum[self._written] = self._checksums(self._written)
        if rows.dtype.kind != "f":
            return  # token ids: the logits stayed on the device
        for seq_id, row in zip(seq_ids, rows, strict=True):
            if np.isnan(row).any():
                raise SanitizerError(
                    f"sequence {seq_id} has NaN among its logits: attention read a slot outside its "
                    f"{self._manager.length(seq_id)} tokens"
                )

    def _follow(self, transfer: Transfer) -> None:
        source = np.arange(transfer.source * self._unit, (transfer.source + transfer.count) * self._unit)
        first = transfer.destination * self._unit
        destination = np.arange(first, first + len(source))
        here = self._host if transfer.kind == "swap_in" else self._device
        there = self._host if transfer.kind == "swap_out" else self._device
        here.copy(source, there, destination)
        for i in range(transfer.count):
            what = f"{transfer.kind} of {transfer.source + i} to {transfer.destination + i}"
            if there is self._device:
                self._note(transfer.destination + i, what)
            if here is self._device:
                self._note(transfer.source + i, what)

    def _poison_unused(self) -> None:
        used = _used_slots(self._manager, len(self._device.writer))
        stale = np.flatnonzero((self._device.writer != _UNWRITTEN) & ~used)
        if not stale.size:
            return
        self._storage.poison_slots(stale)
        self._device.writer[stale] = self._device.position[stale] = _UNWRITTEN
        for row in dict.fromkeys((stale // self._unit).tolist()):
            self._note(row, "slots given back, and filled with NaN")

    def _slots_read(self, seq_id: int, length: int) -> np.ndarray:
        """[length]: where attention finds the sequence's keys. Not asked of `slots`, which says where to write."""
        positions = np.arange(length)
        if isinstance(self._manager, BlockTables):
            table = np.array(self._manager.block_table(seq_id), dtype=np.int64)
            if length > len(table) * self._unit:
                raise SanitizerError(f"sequence {seq_id} reads {length} tokens; its table has blocks {table.tolist()}")
            return np.asarray(slot_of(table, positions, self._unit))
        assert isinstance(self._manager, Contiguous)
        return self._manager.start(seq_id) + positions

    def _checksums(self, slots: np.ndarray) -> np.ndarray:
        """[len(slots)]: of the bits of all K and V there, in whole numbers, so that no order of adding matters."""
        kv = to_host(self._storage.device[:, :, xp.asarray(slots // self._unit), xp.asarray(slots % self._unit)])
        bits = np.ascontiguousarray(np.moveaxis(kv, 2, 0)).view(f"u{kv.dtype.itemsize}").reshape(len(slots), -1)
        weights = 2 * np.arange(bits.shape[1], dtype=np.uint64) + 1
        return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))

    def _check_contents(self, seq_id: int, length: int) -> None:
        if not length:
            return
        slots = self._slots_read(seq_id, length)
        wrong = np.flatnonzero(self._checksums(slots) != self._device.checksum[slots])
        if not wrong.size:
            return
        position = int(wrong[0])
        slot = int(slots[position])
        raise SanitizerError(
            f"sequence {seq_id} reads position {position} from {self._name(slot)}, but what lies there is not the K "
            f"and V that sequence {self._device.writer[slot]} wrote: a copy was not made in time, or someone wrote "
            f"over it. Last there: {self._last(slot)}."
        )

    def _check_owners(self, seq_id: int, tokens: Sequence[int], length: int) -> None:
        slots = self._slots_read(seq_id, length)
        expected = self._fingerprint(seq_id, tokens, length)
        owners = self._device
        right = (owners.writer[slots] != _UNWRITTEN) & (owners.position[slots] == np.arange(length))
        right &= owners.fingerprint[slots] == expected
        if right.all():
            return
        position = int(np.flatnonzero(~right)[0])
        slot = int(slots[position])
        writer, written = int(owners.writer[slot]), int(owners.position[slot])
        if writer == _UNWRITTEN:
            found = "nobody has written it since it was given out"
        elif written != position:
            found = f"sequence {writer} wrote its position {written} there"
        else:
            found = f"sequence {writer} wrote it, after other tokens"
        raise SanitizerError(
            f"sequence {seq_id} reads position {position} from {self._name(slot)}, but {found}. "
            f"Last there: {self._last(slot)}."
        )

    def _last(self, slot: int) -> str:
        return "; ".join(self._history.get(slot // self._unit, ())) or "nothing"

    def _name(self, slot: int) -> str:
        if isinstance(self._manager, BlockTables):
            return f"block {slot // self._unit}, offset {slot % self._unit}"
        return f"slot {slot}"

    def _note(self, row: int, what: str) -> None:
        self._history.setdefault(row, deque(maxlen=4)).append(what)

    def _fingerprint(self, seq_id: int, tokens: Sequence[int], length: int) -> np.ndarray:
        """[length]: for each position a hash of the tokens up to it; K and V depend on just these."""
        known = self._fingerprints.setdefault(seq_id, [])
        for position in range(len(known), length):
            known.append(hash((known[-1] if known else 0, tokens[position])))
        return np.array(known[:length], dtype=np.int64)


def _used_slots(manager: KVCacheManager, num_slots: int) -> np.ndarray:
    """[num_slots]: the slots that hold a token of a sequence, or of the prefix cache."""
    used = np.zeros(num_slots, dtype=bool)
    if isinstance(manager, PagedManager):
        blocks = used.reshape(-1, manager.block_size)
        for table in manager.tables.values():
            if not table.on_host and table.blocks:
                blocks[table.blocks[:-1]] = True
                blocks[table.blocks[-1], : (table.length - 1) % manager.block_size + 1] = True
        if manager.cache:
            blocks[list(manager.cache.idle)] = True
    elif isinstance(manager, (StandardManager, SwappingManager)):
        for region in manager.regions.values():
            if not region.on_host:
                used[region.start : region.start + region.length] = True
    return used
