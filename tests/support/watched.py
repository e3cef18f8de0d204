"""A manager with its oracles beside it: what its sequences would read, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager, OutOfHostBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager
from support.books import books, held_on_device, held_on_host
from support.shadow import ShadowMemory


class Oracle:
    """Knows what each position of each sequence must hold.

    The value of a position stands for its K and V: it depends on all tokens up to there, and on nothing else.
    """

    def __init__(self, make: Callable[[], KVCacheManager]) -> None:
        self.manager = make()
        self.memory = ShadowMemory(self.manager)
        self.num_changes = 0  # of memory
        self.values: dict[int, list[int]] = {}
        self.committed: set[int] = set()  # values at the ends of all blocks that were committed

    def learn(self, seq_id: int, tokens: Sequence[int]) -> list[int]:
        """The values of all positions of a sequence that has these tokens."""
        values = self.values.setdefault(seq_id, [])
        for position in range(len(values), len(tokens)):
            values.append(hash((values[-1] if values else 0, tokens[position])))
        return values

    def check_read(self, seq_id: int, length: int) -> None:
        """The sequence finds its own values at its first positions."""
        found = self.memory.read(seq_id, length)
        if found != self.values[seq_id][:length]:
            wrong = [i for i, value in enumerate(self.values[seq_id][:length]) if found[i : i + 1] != [value]]
            raise AssertionError(f"sequence {seq_id} reads what is not its own at positions {wrong} of {length}")

    def check_hit(self, seq_id: int, num_known: int, num_tokens: int) -> None:
        """A hit is whole blocks that were committed, and leaves a token to compute."""
        assert 0 <= num_known < num_tokens
        if num_known:
            assert num_known % self.manager.block_size == 0
            assert self.values[seq_id][num_known - 1] in self.committed

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        self.manager.commit(seq_id, tokens, num_written)
        if isinstance(self.manager, PagedManager) and isinstance(self.manager.pool, CachingBlockPool):
            size = self.manager.block_size
            self.committed.update(self.values[seq_id][size - 1 : num_written : size])

    def check(self) -> None:
        """Integrity, and a sum over all slots."""
        self.manager.check_integrity()
        assert self.manager.snapshot().usage({}).total == self.manager.num_slots

    def check_empty(self) -> None:
        """No sequence is left: nothing is held, on the device or on the host."""
        self.check()
        manager, usage = self.manager, self.manager.snapshot().usage({})
        assert held_on_device(manager) == held_on_host(manager) == []
        assert usage.free + usage.cached == manager.num_slots
        if isinstance(manager, PagedManager):
            assert not any(manager.pool.ref_count)
        if isinstance(manager, SwappablePagedManager):
            assert manager.host_pool.num_free == manager.host_pool.num_blocks
        if isinstance(manager, SwappingManager):
            assert manager.host_pool.holes in ([], [(0, manager.host_pool.num_slots)])


class Watched(Oracle):
    """Carries out one operation after another, each with all its cheap checks.

    A method returns False if the manager refused; then nothing may have changed, and there was a reason.
    """

    def __init__(self, make: Callable[[], KVCacheManager]) -> None:
        super().__init__(make)
        self.tokens: dict[int, list[int]] = {}  # all that is known of each sequence; not all may have a slot
        self.lengths: dict[int, int] = {}  # tokens with a slot
        self.limits: dict[int, int] = {}
        self.host: set[int] = set()
        self.num_operations = 0
        self.num_refused = 0
        self._next_id = 0

    def device(self) -> list[int]:
        return [seq_id for seq_id in self.tokens if seq_id not in self.host]

    def admit(self, tokens: Sequence[int], limit: int) -> bool:
        self.num_operations += 1
        seq_id, before = self._next_id, books(self.manager)
        try:
            known = self.manager.admit(seq_id, tokens, limit)
        except OutOfBlocks:
            assert self.device(), "the device is empty, and the sequence fits"
            return self._refused(before)
        self._begin(seq_id, list(tokens), known, limit)
        self.learn(seq_id, tokens)
        self.check_hit(seq_id, known, len(tokens))
        return self._done([seq_id])

    def append(self, appends: Sequence[tuple[int, int]], token: int) -> bool:
        """More tokens of several sequences in one call; `token` where a sequence has no more of its own."""
        self.num_operations += 1
        for seq_id, count in appends:
            missing = self.lengths[seq_id] + count - len(self.tokens[seq_id])
            if missing > 0:
                self.tokens[seq_id] += [token] * missing
                self.learn(seq_id, self.tokens[seq_id])
        before = books(self.manager)
        try:
            transfers = self.manager.append(appends)
        except OutOfBlocks:
            self._check_append_refused(appends)
            return self._refused(before)
        self.memory.follow(transfers)
        for seq_id, count in appends:
            first = self.lengths[seq_id]
            self.memory.write(seq_id, first, self.values[seq_id][first : first + count])
            self.lengths[seq_id] += count
        return self._done([seq_id for seq_id, _ in appends])

    def commit_some(self, seq_id: int, num_written: int) -> None:
        self.num_operations += 1
        self.commit(seq_id, self.tokens[seq_id], num_written)

    def fork(self, parent_id: int) -> int:
        self.num_operations += 1
        assert self.manager.can_fork
        child_id = self._next_id
        self.manager.fork(parent_id, child_id)
        self._begin(child_id, self.tokens[parent_id].copy(), self.lengths[parent_id], self.limits[parent_id])
        self.values[child_id] = self.values[parent_id].copy()
        self._done([parent_id, child_id])
        return child_id

    def reorder(self, beams: Sequence[int], chosen: Sequence[int], tokens: Sequence[int]) -> None:
        """Beam search as the engine does it: a parent chosen twice is forked, one not chosen is freed.

        `chosen` are parents in `beams`, the best first; each goes on with its token of `tokens`.
        """
        going_on: list[int] = []
        for parent in chosen:
            going_on.append(self.fork(parent) if parent in going_on else parent)
        for seq_id in beams:
            if seq_id not in going_on:
                self.free(seq_id)
        for seq_id, token in zip(going_on, tokens, strict=True):
            length = self.lengths[seq_id]
            del self.tokens[seq_id][length:], self.values[seq_id][length:]
            if length < self.limits[seq_id]:
                self.append([(seq_id, 1)], token)

    def free(self, seq_id: int) -> None:
        self.num_operations += 1
        self.manager.free(seq_id)
        for known in (self.tokens, self.values, self.lengths, self.limits):
            del known[seq_id]
        self.host.discard(seq_id)
        self._done([])

    def swap_out(self, seq_ids: Sequence[int]) -> bool:
        self.num_operations += 1
        assert self.manager.can_swap
        before = books(self.manager)
        try:
            transfers = self.manager.swap_out(seq_ids)
        except OutOfHostBlocks:
            if isinstance(self.manager, SwappablePagedManager):
                blocks = {block for seq_id in seq_ids for block in self.manager.placement(seq_id)}
                assert len(blocks) > self.manager.host_pool.num_free
            return self._refused(before)
        self.host.update(seq_ids)
        self.memory.follow(transfers)
        return self._done(seq_ids)

    def swap_in(self, seq_ids: Sequence[int]) -> bool:
        self.num_operations += 1
        assert self.manager.can_swap
        before = books(self.manager)
        try:
            transfers = self.manager.swap_in(seq_ids)
        except OutOfBlocks:
            assert self.device() or len(seq_ids) > 1, "the device is empty, and the sequence fits"
            return self._refused(before)
        self.host.difference_update(seq_ids)
        self.memory.follow(transfers)
        return self._done(seq_ids)

    def check_all(self) -> None:
        """check(), and all sequences are where they should be and read their own values."""
        self.check()
        assert sorted(held_on_device(self.manager)) == sorted(self.device())
        assert sorted(held_on_host(self.manager)) == sorted(self.host)
        for seq_id, length in self.lengths.items():
            assert self.manager.length(seq_id) == length
            self.check_read(seq_id, length)

    def end(self) -> None:
        """Free all that is left; nothing may stay behind."""
        for seq_id in list(self.tokens):
            self.free(seq_id)
        self.check_empty()

    def _begin(self, seq_id: int, tokens: list[int], length: int, limit: int) -> None:
        self.tokens[seq_id], self.lengths[seq_id], self.limits[seq_id] = tokens, length, limit
        self._next_id += 1

    def _done(self, seq_ids: Sequence[int]) -> bool:
        for seq_id in seq_ids:
            self.check_read(seq_id, self.lengths[seq_id])
        return True

    def _refused(self, before: object) -> bool:
        self.num_refused += 1
        assert books(self.manager) == before, "a refused operation changed something"
        return False

    def _check_append_refused(self, appends: Sequence[tuple[int, int]]) -> None:
        """Count the blocks that were needed, one append after another; or, of a region, that others lie there."""
        manager = self.manager
        if not isinstance(manager, PagedManager):
            assert len(self.device()) > 1, "the device has no other sequence, and this one fits"
            return
        size, ref_count, needed = manager.block_size, manager.pool.ref_count.copy(), 0
        for seq_id, count in appends:
            table = manager.tables[seq_id]
            if count and table.length % size and ref_count[table.blocks[-1]] > 1:
                ref_count[table.blocks[-1]] -= 1
                needed += 1
            needed += -(-(table.length + count) // size) - len(table.blocks)
        assert needed > manager.pool.num_free
