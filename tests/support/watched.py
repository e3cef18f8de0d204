"""A manager with its oracles beside it: what its events say, and what its sequences would read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import Forkable, KVCacheManager, OutOfHostBlocks, Swappable
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.swapping import SwappingManager
from paged_ref.timeline.events import BlockCached, Event, Log, PoolOpened
from paged_ref.timeline.state import MemoryState, RunState
from support.manager_state import state_of
from support.shadow import ShadowMemory


class Oracle:
    """Follows a manager's events, and knows what each position of each sequence must hold.

    The value of a position stands for its K and V: it depends on all tokens up to there, and on nothing else.
    """

    def __init__(self, make: Callable[[Log], KVCacheManager]) -> None:
        self.events: list[Event] = []  # not yet replayed
        self.manager = make(self.events.append)
        self.memory = ShadowMemory(self.manager)
        self._state = RunState()
        self.num_events = 0  # that changed memory
        self.values: dict[int, list[int]] = {}
        self.committed: set[int] = set()  # values at the ends of all blocks that the prefix cache was told of
        self.settle()

    @property
    def replayed(self) -> MemoryState:
        """The manager's memory, as the events say it."""
        return self._state.memory

    def settle(self) -> None:
        """Replay the events since the last time."""
        for event in self.events:
            self._state.apply(event)
            if not isinstance(event, (PoolOpened, BlockCached)):
                self.num_events += 1
        self.events.clear()

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
        """A hit is whole blocks that were told to be written, and leaves a token to compute."""
        assert 0 <= num_known < num_tokens
        if num_known:
            assert isinstance(self.manager, PagedManager)
            assert num_known % self.manager.block_size == 0
            assert self.values[seq_id][num_known - 1] in self.committed

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        self.manager.commit(seq_id, tokens, num_written)
        if isinstance(self.manager, PagedManager) and self.manager.cache:
            size = self.manager.block_size
            self.committed.update(self.values[seq_id][size - 1 : num_written : size])

    def check(self) -> None:
        """Integrity, replay, and a sum over all slots."""
        self.settle()
        self.manager.check_integrity()
        assert self.replayed == state_of(self.manager)
        assert self.manager.snapshot().usage({}).total == self.manager.num_slots

    def check_empty(self) -> None:
        """No sequence is left: nothing is held, on the device or on the host."""
        self.check()
        state, usage = self.replayed, self.manager.snapshot().usage({})
        assert not state.sequences
        assert usage.free + usage.cached == self.manager.num_slots
        assert not any(state.ref_count)
        assert sorted(state.host_free) == list(range(len(state.host_ref_count)))
        if isinstance(self.manager, SwappingManager):
            assert self.manager.host_pool.holes in ([], [(0, self.manager.host_pool.num_slots)])


class Watched(Oracle):
    """Carries out one operation after another, each with all its cheap checks.

    A method returns False if the manager refused; then nothing may have changed, and there was a reason.
    """

    def __init__(self, make: Callable[[Log], KVCacheManager]) -> None:
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
        seq_id = self._next_id
        try:
            known = self.manager.admit(seq_id, tokens, limit)
        except OutOfBlocks:
            assert self.device(), "the device is empty, and the sequence fits"
            return self._refused()
        self._begin(seq_id, list(tokens), known, limit)
        self.learn(seq_id, tokens)
        self.check_hit(seq_id, known, len(tokens))
        return self._done([seq_id])

    def append(self, appends: Sequence[tuple[int, int]], token: int) -> bool:
        """More tokens of several sequences at once; `token` where a sequence has no more of its own."""
        self.num_operations += 1
        for seq_id, count in appends:
            missing = self.lengths[seq_id] + count - len(self.tokens[seq_id])
            if missing > 0:
                self.tokens[seq_id] += [token] * missing
                self.learn(seq_id, self.tokens[seq_id])
        try:
            transfers = self.manager.append(appends)
        except OutOfBlocks:
            self._check_append_refused(appends)
            return self._refused()
        self.memory.follow(transfers)
        for seq_id, count in appends:
            first = self.lengths[seq_id]
            self.memory.write(seq_id, first, self.values[seq_id][first : first + count])
            self.lengths[seq_id] += count
        return self._done([seq_id for seq_id, _ in appends])

    def commit_some(self, seq_id: int, num_written: int) -> None:
        self.num_operations += 1
        self.commit(seq_id, self.tokens[seq_id], num_written)
        self.settle()

    def fork(self, parent_id: int) -> int:
        self.num_operations += 1
        assert isinstance(self.manager, Forkable)
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
        assert isinstance(self.manager, Swappable)
        try:
            transfers = self.manager.swap_out(seq_ids)
        except OutOfHostBlocks:
            if isinstance(self.manager, PagedManager):
                blocks = {block for seq_id in seq_ids for block in self.replayed.sequences[seq_id].blocks}
                assert len(blocks) > len(self.replayed.host_free)
            return self._refused()
        self.host.update(seq_ids)
        self.memory.follow(transfers)
        return self._done(seq_ids)

    def swap_in(self, seq_ids: Sequence[int]) -> bool:
        self.num_operations += 1
        assert isinstance(self.manager, Swappable)
        try:
            transfers = self.manager.swap_in(seq_ids)
        except OutOfBlocks:
            assert self.device() or len(seq_ids) > 1, "the device is empty, and the sequence fits"
            return self._refused()
        self.host.difference_update(seq_ids)
        self.memory.follow(transfers)
        return self._done(seq_ids)

    def check_everyone(self) -> None:
        """check(), and all sequences read their own values."""
        self.check()
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
        self.settle()
        for seq_id in seq_ids:
            self.check_read(seq_id, self.lengths[seq_id])
        return True

    def _refused(self) -> bool:
        self.num_refused += 1
        assert not self.events, "the manager told of something that it refused"
        assert state_of(self.manager) == self.replayed, "a refused operation changed something"
        return False

    def _check_append_refused(self, appends: Sequence[tuple[int, int]]) -> None:
        """Count the blocks that were needed, one append after another; or, of a region, that others lie there."""
        if not isinstance(self.manager, PagedManager):
            assert len(self.device()) > 1, "the device has nobody else, and the sequence fits"
            return
        size, ref_count, needed = self.manager.block_size, self.replayed.ref_count.copy(), 0
        for seq_id, count in appends:
            place = self.replayed.sequences[seq_id]
            if count and place.length % size and ref_count[place.blocks[-1]] > 1:
                ref_count[place.blocks[-1]] -= 1
                needed += 1
            needed += -(-(place.length + count) // size) - len(place.blocks)
        assert needed > len(self.replayed.free) + len(self.replayed.cached)
