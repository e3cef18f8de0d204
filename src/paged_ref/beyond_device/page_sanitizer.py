"""The sanitizer of pages that move: what KVSanitizer is for blocks that stay (sanitizer.py).

A page remembers, for each of its slots, whose key was written there and a checksum of it. Before attention reads a
slot, on the device, in a staging block or on the host, the page's record must be the reader's own, and what lies there
must have that checksum: a copy that was not made, came too late or went elsewhere shows. Blocks without a page are
NaN. Costs time in proportion to the cache: for tests and lessons.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.device import to_host, xp
from ..core.memory.kv import PageStorage
from ..core.memory.manager import Transfer
from ..extras.sanitizer import SanitizerError
from .attention import Check
from .streaming import StreamingManager


class PageSanitizer:
    """Watches one manager and its storage. Raises SanitizerError with the page, its place, reader and writer."""

    def __init__(self, manager: StreamingManager, storage: PageStorage) -> None:
        self._manager, self._storage = manager, storage
        shape = (len(manager.residency.device_of), manager.block_size)  # of all pages
        self._writer = np.full((*shape, 4), -1, dtype=np.int64)  # sequence, layer, KV head, position
        self._fingerprint = np.zeros(shape, dtype=np.int64)  # of all tokens up to there
        self._checksum = np.zeros(shape, dtype=np.uint64)
        self._fingerprints: dict[int, list[int]] = {}  # of each sequence, by position

    def before_step(self, transfers: Sequence[Transfer], chunks: Sequence[tuple[int, Sequence[int], int, int]]) -> None:
        """`chunks` are (sequence, its tokens, how many are computed, how many this step computes)."""
        for seq_id, tokens, computed, count in chunks:
            known = self._fingerprints.setdefault(seq_id, [])
            for position in range(len(known), computed + count):
                known.append(hash((known[-1] if known else 0, tokens[position])))
        self._poison()

    def after_step(self, seq_ids: Sequence[int], rows: np.ndarray) -> None:
        """The step's results, one row for each sequence: NaN means that a kernel read a poisoned slot."""
        if rows.dtype.kind != "f":
            return
        for seq_id, row in zip(seq_ids, rows, strict=True):
            if np.isnan(row).any():
                raise SanitizerError(f"sequence {seq_id} has NaN among its logits: attention read a slot not its own")

    def _poison(self) -> None:
        """NaN wherever there is no page: staging blocks, and blocks that were given back."""
        residency = self._manager.residency
        self._storage.synchronize()
        for cache, place in ((self._storage.device, residency.device_of), (self._storage.host, residency.host_of)):
            unused = np.ones(cache.shape[2], dtype=bool)
            used = np.frombuffer(place, dtype=np.int64)
            unused[used[used >= 0]] = False
            cache[:, :, np.flatnonzero(unused) if isinstance(cache, np.ndarray) else xp.asarray(unused)] = np.nan

    def wrote(
        self,
        layer: int,
        pages: np.ndarray,
        seqs: np.ndarray,
        heads: np.ndarray,
        positions: np.ndarray,
        blocks: np.ndarray,
        offsets: np.ndarray,
    ) -> None:
        """Arrays with an entry for each slot that was written: its page, whose key it is, and where it lies."""
        self._writer[pages, offsets] = np.stack([seqs, np.full_like(seqs, layer), heads, positions], axis=-1)
        fingerprints = [self._fingerprints[seq][position] for seq, position in zip(seqs, positions, strict=True)]
        self._fingerprint[pages, offsets] = fingerprints
        self._checksum[pages, offsets] = self._checksums(blocks, offsets)

    def checker(
        self, layer: int, readers: Sequence[tuple[int, int]], blocks: Sequence[np.ndarray], pages: Sequence[np.ndarray]
    ) -> Check:
        """For a call of streamed_attention whose sequence i is `readers[i]` (sequence, KV head), and reads these
        logical blocks, which are in these pages."""

        def check(rows: np.ndarray, table: np.ndarray, first_keys: np.ndarray, counts: np.ndarray) -> None:
            size = self._manager.block_size
            for row, places, first, count in zip(rows, table, first_keys, counts, strict=True):
                keys = np.arange(count)
                of, offsets = (first + keys) // size, keys % size
                expected = blocks[row][of] * size + offsets  # positions
                self._check((*readers[row], layer), pages[row][of], places[keys // size], offsets, expected)

        return check

    def _check(
        self,
        reader: tuple[int, int, int],
        pages: np.ndarray,
        places: np.ndarray,
        offsets: np.ndarray,
        expected: np.ndarray,
    ) -> None:
        seq_id, head, layer = reader
        writer = self._writer[pages, offsets]
        right = (writer == np.stack(np.broadcast_arrays(seq_id, layer, head, expected), axis=-1)).all(axis=-1)
        right &= self._fingerprint[pages, offsets] == np.array(self._fingerprints[seq_id])[expected]
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
        """[len(places)]: of the bits of K and V there, in whole numbers, so that no order of adding matters."""
        num_device = self._storage.device.shape[2]
        self._storage.synchronize()
        here = places < num_device
        kv = np.empty((2, len(places), *self._storage.host.shape[4:]), dtype=self._storage.host.dtype)
        kv[:, here] = to_host(self._storage.device[0][:, xp.asarray(places[here]), xp.asarray(offsets[here])])
        kv[:, ~here] = self._storage.host[0][:, places[~here] - num_device, offsets[~here]]
        bits = np.ascontiguousarray(np.moveaxis(kv, 1, 0)).view(f"u{kv.dtype.itemsize}").reshape(len(places), -1)
        weights = 2 * np.arange(bits.shape[1], dtype=np.uint64) + 1
        return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))

    def _name(self, place: int) -> str:
        num_device, staging = self._storage.device.shape[2], self._manager.residency.device.num_blocks
        if place >= num_device:
            return f"host block {place - num_device}"
        return f"device block {place}" if place < staging else f"staging block {place - staging}"
