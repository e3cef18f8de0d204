"""The KV sanitizer: every slot remembers who wrote it, and every read is checked before it happens.

What AddressSanitizer is to memory. A slot that no sequence uses is filled with NaN, so that a kernel that
strays shows it; and before attention reads a slot, its owner's record must be of the same position after the
same tokens. Costs time in proportion to the cache: for tests and lessons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from .managers import BlockTables, KVCacheManager, Transfer
from .paged import PagedManager
from .standard import StandardManager
from .storage import KVStorage
from .swapping import SwappingManager

_UNWRITTEN = -1


class SanitizerError(RuntimeError):
    """A sequence would have read, or has read, what is not its own."""


class _Owners:
    """For each slot: who wrote it, at which position, and a fingerprint of all tokens up to there."""

    def __init__(self, num_slots: int) -> None:
        self.writer = np.full(num_slots, _UNWRITTEN, dtype=np.int64)
        self.position = np.full(num_slots, _UNWRITTEN, dtype=np.int64)
        self.fingerprint = np.zeros(num_slots, dtype=np.int64)

    def copy(self, source: np.ndarray, other: _Owners, destination: np.ndarray) -> None:
        """Slots `destination` of `other` now hold what slots `source` hold here."""
        other.writer[destination] = self.writer[source]
        other.position[destination] = self.position[source]
        other.fingerprint[destination] = self.fingerprint[source]


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

    def before_step(self, transfers: Sequence[Transfer], chunks: Sequence[tuple[int, Sequence[int], int, int]]) -> None:
        """After the step's transfers, before its attention: follow the copies, poison, write, check all reads.

        `chunks` are (sequence, its tokens, how many are computed, how many this step computes).
        """
        for transfer in transfers:
            self._follow(transfer)
        self._poison_unused()
        for seq_id, tokens, computed, count in chunks:
            slots = np.array(self._manager.slots(seq_id, computed, count), dtype=np.int64)
            self._device.writer[slots] = seq_id
            self._device.position[slots] = np.arange(computed, computed + count)
            self._device.fingerprint[slots] = self._fingerprint(seq_id, tokens, computed + count)[computed:]
            for row in dict.fromkeys((slots // self._unit).tolist()):
                self._note(row, f"sequence {seq_id} wrote positions {computed} to {computed + count - 1}")
        for seq_id, tokens, computed, count in chunks:
            self._check_read(seq_id, tokens, computed + count)

    def after_step(self, seq_ids: Sequence[int], rows: np.ndarray) -> None:
        """The step's results, one row for each sequence: NaN means that a kernel read a poisoned slot."""
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

    def _check_read(self, seq_id: int, tokens: Sequence[int], length: int) -> None:
        slots = np.array(self._manager.slots(seq_id, 0, length), dtype=np.int64)
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
            f"Last there: {'; '.join(self._history.get(slot // self._unit, ())) or 'nothing'}."
        )

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
