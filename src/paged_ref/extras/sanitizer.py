"""The KV sanitizer: the writer of every slot is remembered, and every read is checked before it happens.

What AddressSanitizer is to memory. A slot that no sequence uses is filled with NaN, so that a kernel that strays shows
it. Before attention reads a slot, the record of its writer must be of the same position after the same tokens, and a
checksum must find the K and V that were written, so that a copy which was never made, or came too late, shows too. It
costs time in proportion to the cache: for tests and lessons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ..core.attention.addressing import slot_of
from ..core.attention.attention import Addresses
from ..core.device import Array, module_of, to_host, xp
from ..core.engine.scheduler import StepPlan
from ..core.memory.kv import KVCache
from ..core.memory.manager import KVCacheManager, Transfer
from ..core.memory.paged import PagedManager
from ..core.memory.regions import RegionManager
from ..core.model.llama import StepInputs
from .prefix_cache import CachingBlockPool

_UNWRITTEN = -1


class SanitizerError(RuntimeError):
    """A sequence would read, or has read, K and V that belong to another one or to none."""


# Of a slot: the sequence that wrote it, at which position, a fingerprint of all tokens up to there, and a checksum of
# the K and V that were written.
_OWNER = np.dtype([("writer", "i8"), ("position", "i8"), ("fingerprint", "i8"), ("checksum", "u8")])


def _owners(num_slots: int) -> np.ndarray:
    """[num_slots] records of slots that nothing has written."""
    return np.full(num_slots, np.array((_UNWRITTEN, _UNWRITTEN, 0, 0), _OWNER))


class Fingerprints:
    """For each position of a sequence a hash of the tokens up to it; K and V depend on just these."""

    def __init__(self) -> None:
        self._known: dict[int, list[int]] = {}  # of each sequence, by position

    def of(self, seq_id: int, tokens: Sequence[int], length: int) -> np.ndarray:
        """[length] int64, for the first `length` tokens."""
        known = self._known.setdefault(seq_id, [])
        for position in range(len(known), length):
            known.append(hash((known[-1] if known else 0, tokens[position])))
        return np.array(known[:length], dtype=np.int64)

    def keep(self, running: Sequence[int]) -> None:
        """Forget all other sequences; the fingerprints of a preempted one can be made again."""
        for seq_id in self._known.keys() - set(running):
            del self._known[seq_id]


def checksums(kv: np.ndarray) -> np.ndarray:
    """[num_slots]: of the bits of `kv [num_slots, ...]`, in whole numbers, so that no order of adding matters."""
    bits = np.ascontiguousarray(kv).view(f"u{kv.dtype.itemsize}").reshape(len(kv), -1)
    weights = 2 * np.arange(bits.shape[1], dtype=np.uint64) + 1
    return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))


def check_numbers(seq_id: int, layer: int, query: Array, key: Array, value: Array, mixed: Array) -> None:
    """NaN in `mixed`, the attention of this sequence in one layer, means that a kernel read a poisoned slot.

    All are [num_tokens, heads, head_size]. NaN and inf among the queries, keys and values of this step were there
    before attention.
    """
    module = module_of(mixed)
    if not bool(module.isnan(mixed).any()):
        return
    for what, computed in (("queries", query), ("keys", key), ("values", value)):
        if not bool(module.isfinite(computed).all()):
            raise SanitizerError(
                f"sequence {seq_id} has NaN or inf among its {what} in layer {layer}, before attention: the weights "
                "hold NaN, or numbers grew too large"
            )
    raise SanitizerError(
        f"sequence {seq_id} has NaN in its attention in layer {layer}: a kernel read a slot outside its tokens"
    )


class SanitizedKV:
    """A KV around another one, whose reads and writes it checks: it watches the manager and the slots. Raises
    SanitizerError with the block, the reader and the owner."""

    def __init__(self, manager: KVCacheManager, kv: KVCache) -> None:
        self.inner = kv
        self._manager = manager
        self._unit = kv.block_size  # slots in a row: the block size, or 1
        self._device = _owners(kv.device.shape[2] * self._unit)
        self._host = _owners(kv.host.shape[2] * self._unit)
        self._fingerprints = Fingerprints()
        self._history: dict[int, deque[str]] = {}  # of each row: what happened to it last
        self._chunks: list[tuple[int, int]] = []  # (sequence, tokens computed in this step)
        self._written = np.zeros(0, dtype=np.int64)  # slots that the step under way writes

    def begin_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        self.inner.begin_step(plan, inputs)
        chunks = [(seq.seq_id, seq.tokens, seq.num_computed, count) for seq, count in plan.chunks]
        self.before_step(plan.transfers, chunks, inputs.addresses)
        self._chunks = [(seq.seq_id, count) for seq, count in plan.chunks]

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, addresses: Addresses, window: int | None
    ) -> Array:
        mixed = self.inner.attend(layer, query, key, value, addresses, window)
        first = 0
        for seq_id, count in self._chunks:
            rows = slice(first, first + count)
            check_numbers(seq_id, layer, query[rows], key[rows], value[rows], mixed[rows])
            first += count
        if layer == len(self.inner.layers) - 1:
            self.after_step()
        return mixed

    def before_step(
        self,
        transfers: Sequence[Transfer],
        chunks: Sequence[tuple[int, Sequence[int], int, int]],
        addresses: Addresses | None = None,
    ) -> None:
        """After the step's transfers, before its attention: follow the copies, poison, write, check all reads.

        `chunks` are (sequence, its tokens, how many are computed, how many this step computes). `addresses` are what
        the kernels will be given, in the order of the chunks.
        """
        for transfer in transfers:
            self._follow(transfer)
        self._fingerprints.keep([seq_id for seq_id, *_ in chunks])
        self._poison_unused()
        written = []
        for seq_id, tokens, computed, count in chunks:
            slots = np.array(self._manager.slots(seq_id, computed, count), dtype=np.int64)
            written.append(slots)
            self._device["writer"][slots] = seq_id
            self._device["position"][slots] = np.arange(computed, computed + count)
            self._device["fingerprint"][slots] = self._fingerprints.of(seq_id, tokens, computed + count)[computed:]
            for row in dict.fromkeys((slots // self._unit).tolist()):
                self._note(row, f"sequence {seq_id} wrote positions {computed} to {computed + count - 1}")
        self._written = np.concatenate(written)
        for i, (seq_id, tokens, computed, count) in enumerate(chunks):
            self._check_owners(seq_id, tokens, computed + count)
            self._check_contents(seq_id, computed)
            if addresses is not None:
                self._check_addresses(seq_id, i, computed + count, addresses)
        if addresses is not None and self._written.tolist() != addresses.slot_mapping.tolist():  # type: ignore[union-attr]
            raise SanitizerError("the slot_mapping of the step is not what the manager says")

    def after_step(self) -> None:
        """The step has written its K and V: keep their checksums."""
        self._device["checksum"][self._written] = self._checksums(self._written)

    def _check_addresses(self, seq_id: int, row: int, length: int, addresses: Addresses) -> None:
        """Are the kernels given what the manager says of the sequence?"""
        placement = np.array(self._manager.placement(seq_id))
        tables, starts = addresses.block_tables, addresses.starts
        given = tables[row, : len(placement)] if tables is not None else starts[row : row + 1]  # type: ignore[index]
        if addresses.seq_lens[row] != length or not np.array_equal(given, placement):
            raise SanitizerError(
                f"sequence {seq_id} has {length} tokens in {placement.tolist()}; the kernels are given "
                f"{int(addresses.seq_lens[row])} in {given.tolist()}"
            )

    def _follow(self, transfer: Transfer) -> None:
        source = np.arange(transfer.source * self._unit, (transfer.source + transfer.count) * self._unit)
        first = transfer.destination * self._unit
        destination = np.arange(first, first + len(source))
        here = self._host if transfer.kind == "swap_in" else self._device
        there = self._host if transfer.kind == "swap_out" else self._device
        there[destination] = here[source]
        for i in range(transfer.count):
            what = f"{transfer.kind} of {transfer.source + i} to {transfer.destination + i}"
            if there is self._device:
                self._note(transfer.destination + i, what)
            if here is self._device:
                self._note(transfer.source + i, what)

    def _poison_unused(self) -> None:
        used = _used_slots(self._manager, len(self._device))
        stale = np.flatnonzero((self._device["writer"] != _UNWRITTEN) & ~used)
        if not stale.size:
            return
        for layer in self.inner.slots:
            for cache in layer:
                cache[xp.asarray(stale)] = self.inner.nan
        self._device["writer"][stale] = self._device["position"][stale] = _UNWRITTEN
        for row in dict.fromkeys((stale // self._unit).tolist()):
            self._note(row, "slots freed, and filled with NaN")

    def _slots_read(self, seq_id: int, length: int) -> np.ndarray:
        """[length]: where attention finds the sequence's keys. Not asked of `slots`, which says where to write."""
        positions = np.arange(length)
        placement = np.array(self._manager.placement(seq_id), dtype=np.int64)
        if not self._manager.paged:
            return np.asarray(placement[0] + positions)
        if length > len(placement) * self._unit:
            raise SanitizerError(f"sequence {seq_id} reads {length} tokens; its table has blocks {placement.tolist()}")
        return np.asarray(slot_of(placement, positions, self._unit))

    def _checksums(self, slots: np.ndarray) -> np.ndarray:
        rows = xp.asarray(slots)
        kv = np.stack([to_host(cache[rows]) for layer in self.inner.slots for cache in layer], axis=1)
        return checksums(kv)

    def _check_contents(self, seq_id: int, length: int) -> None:
        if not length:
            return
        slots = self._slots_read(seq_id, length)
        wrong = np.flatnonzero(self._checksums(slots) != self._device["checksum"][slots])
        if not wrong.size:
            return
        position = int(wrong[0])
        slot = int(slots[position])
        raise SanitizerError(
            f"sequence {seq_id} reads position {position} from {self._name(slot)}, but what lies there is not the K "
            f"and V that sequence {self._device['writer'][slot]} wrote: a copy was not made in time, or another write "
            f"went over it. Last there: {self._last(slot)}."
        )

    def _check_owners(self, seq_id: int, tokens: Sequence[int], length: int) -> None:
        slots = self._slots_read(seq_id, length)
        expected = self._fingerprints.of(seq_id, tokens, length)
        owners = self._device[slots]
        right = (owners["writer"] != _UNWRITTEN) & (owners["position"] == np.arange(length))
        right &= owners["fingerprint"] == expected
        if right.all():
            return
        position = int(np.flatnonzero(~right)[0])
        slot = int(slots[position])
        writer, written = int(owners["writer"][position]), int(owners["position"][position])
        if writer == _UNWRITTEN:
            found = "nothing was written there since the slot was handed out"
        elif written != position:
            found = f"sequence {writer} wrote its position {written} there"
        else:
            found = f"sequence {writer} wrote there, after other tokens"
        raise SanitizerError(
            f"sequence {seq_id} reads position {position} from {self._name(slot)}, but {found}. "
            f"Last there: {self._last(slot)}."
        )

    def _last(self, slot: int) -> str:
        return "; ".join(self._history.get(slot // self._unit, ())) or "nothing"

    def _name(self, slot: int) -> str:
        if self._manager.paged:
            return f"block {slot // self._unit}, offset {slot % self._unit}"
        return f"slot {slot}"

    def _note(self, row: int, what: str) -> None:
        self._history.setdefault(row, deque(maxlen=4)).append(what)


def _used_slots(manager: KVCacheManager, num_slots: int) -> np.ndarray:
    """[num_slots]: the slots that hold a token of a sequence, or of the prefix cache."""
    used = np.zeros(num_slots, dtype=bool)
    if isinstance(manager, PagedManager):
        blocks = used.reshape(-1, manager.block_size)
        for table in manager.tables.values():
            if table.blocks:
                blocks[table.blocks[:-1]] = True
                blocks[table.blocks[-1], : (table.length - 1) % manager.block_size + 1] = True
        if isinstance(manager.pool, CachingBlockPool):
            blocks[list(manager.pool.cached)] = True
    elif isinstance(manager, RegionManager):
        for region in manager.regions.values():
            used[region.start : region.start + region.length] = True
    else:  # a manager of another kind, which does not say what it has freed
        used[:] = True
    return used
