"""The sanitizer of pages that move: what extras/sanitizer.py is to blocks that stay.

A page remembers, for each of its slots, whose key was written there and a checksum of it. Before attention reads a
slot, on the device, in a staging block or on the host, the page's record must be the reader's own, and the K and V in
the slot must have that checksum. So a copy that was not made, came too late or went elsewhere is found. Blocks without
a page are NaN. Costs time in proportion to the cache: for tests and lessons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.attention.attention import Addresses
from ..core.device import Array, to_host, xp
from ..core.engine.scheduler import StepPlan
from ..core.model.llama import StepInputs
from ..extras.sanitizer import Fingerprints, SanitizerError, check_numbers, checksums
from .attention import Check
from .kv import StreamedKV, Written
from .observation import HeadPages


class SanitizedStreamedKV(StreamedKV):
    """A StreamedKV that checks each read. Raises SanitizerError with the page, its place, reader and writer."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        shape = (len(self._device_block), self.manager.block_size)  # of all pages
        self._writer = np.full((*shape, 4), -1, dtype=np.int64)  # sequence, layer, KV head, position
        self._fingerprint = np.zeros(shape, dtype=np.int64)  # of all tokens up to there
        self._checksum = np.zeros(shape, dtype=np.uint64)
        self._fingerprints = Fingerprints()
        self._expected: dict[int, np.ndarray] = {}  # of each sequence in the step: fingerprints, by position

    def begin_step(self, plan: StepPlan, inputs: StepInputs | None = None) -> None:
        super().begin_step(plan, inputs)
        self._fingerprints.keep([seq.seq_id for seq, _ in plan.chunks])
        self._expected = {
            seq.seq_id: self._fingerprints.of(seq.seq_id, seq.tokens, seq.num_computed + count)
            for seq, count in plan.chunks
        }
        self._poison()

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, addresses: Addresses | None, window: int | None
    ) -> Array:
        out = super().attend(layer, query, key, value, addresses, window)
        for chunk, first, end in zip(self._chunks, self._loc, self._loc[1:], strict=False):
            rows = slice(first, end)
            check_numbers(chunk.seq_id, layer, query[rows], key[rows], value[rows], out[rows])
        return out

    def _poison(self) -> None:
        """Write NaN to blocks without a page: staging blocks, and blocks that were given back."""
        self.storage.synchronize()
        for cache, block_of in ((self.storage.device, self._device_block), (self.storage.host, self._host_block)):
            unused = np.setdiff1d(np.arange(cache.shape[1]), block_of)
            cache[:, unused if isinstance(cache, np.ndarray) else xp.asarray(unused)] = np.nan

    def _wrote(self, layer: int, written: Written) -> None:
        slots = (written.pages, written.offsets)
        writers = (written.seq_ids, np.full_like(written.seq_ids, layer), written.heads, written.positions)
        self._writer[slots] = np.stack(writers, axis=-1)
        pairs = zip(written.seq_ids, written.positions, strict=True)
        self._fingerprint[slots] = [self._expected[seq_id][position] for seq_id, position in pairs]
        self._checksum[slots] = self._checksums(written.blocks, written.offsets)

    def _check(self, layer: int, reads: Sequence[HeadPages]) -> Check:
        size, num_seqs = self.manager.block_size, len(self._chunks)

        def check(rows: np.ndarray, table: np.ndarray, first_keys: np.ndarray, counts: np.ndarray) -> None:
            for row, places, first, count in zip(rows, table, first_keys, counts, strict=True):
                read, keys = reads[row], np.arange(count)
                of, offsets = (first + keys) // size, keys % size
                reader = (self._chunks[row % num_seqs].seq_id, layer, row // num_seqs)
                expected = read.blocks[of] * size + offsets  # positions
                self._check_slots(reader, read.pages[of], places[keys // size], offsets, expected)

        return check

    def _check_slots(
        self, reader: tuple[int, int, int], pages: np.ndarray, places: np.ndarray, offsets: np.ndarray,
        expected: np.ndarray,
    ) -> None:  # fmt: skip
        """`reader` is (sequence, layer, KV head); `places` are blocks of the device, then of the host."""
        seq_id, layer, head = reader
        writer = self._writer[pages, offsets]
        right = (writer == np.stack(np.broadcast_arrays(*reader, expected), axis=-1)).all(axis=-1)
        right &= self._fingerprint[pages, offsets] == self._expected[seq_id][expected]
        same = self._checksums(places, offsets) == self._checksum[pages, offsets]
        if right.all() and same.all():
            return
        i = int(np.flatnonzero(~(right & same))[0])
        where = f"page {pages[i]} in {self._name(int(places[i]))}, offset {offsets[i]}"
        whose = "sequence {}, layer {}, KV head {}, position {}".format(*writer[i])
        found = f"what was written there is of {whose}" if not right[i] else "what lies there is not what was written"
        raise SanitizerError(
            f"sequence {seq_id} reads position {expected[i]} of layer {layer}, KV head {head} from {where}, but {found}"
        )

    def _checksums(self, places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """[len(places)]: of K and V there."""
        device, host = self.storage.device, self.storage.host
        self.storage.synchronize()
        here, num_device = places < device.shape[1], device.shape[1]
        kv = np.empty((len(places), 2, *host.shape[3:]), dtype=host.dtype)
        kv[here] = to_host(device[:, xp.asarray(places[here]), xp.asarray(offsets[here])]).swapaxes(0, 1)
        kv[~here] = host[:, places[~here] - num_device, offsets[~here]].swapaxes(0, 1)
        return checksums(kv)

    def _name(self, place: int) -> str:
        num_device, first_staging = self.storage.device.shape[1], self.manager.residency.device.num_blocks
        if place >= num_device:
            return f"host block {place - num_device}"
        return f"device block {place}" if place < first_staging else f"staging block {place - first_staging}"
