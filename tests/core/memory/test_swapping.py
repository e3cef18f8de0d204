"""The swapping manager: a sequence that outgrows its region can move even where it overlaps itself."""

from __future__ import annotations

import numpy as np
import pytest
from support.shadow import ShadowMemory

from paged_ref.core.device import to_host, xp
from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.core.engine.sequence import Group, Sequence, Status
from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.manager import Transfer
from paged_ref.core.memory.regions import RegionPool
from paged_ref.core.memory.swapping import SwappingManager
from paged_ref.timeline.replay import state_of


def test_a_sequence_that_is_alone_can_grow_wherever_it_lies() -> None:
    """Its own slots are part of the hole that it moves to; else it would wait for room that nobody holds."""
    manager = SwappingManager(12, granule=4)
    memory = ShadowMemory(manager)
    for seq_id, length in ((0, 4), (1, 8)):
        manager.admit(seq_id, [0] * length, 12)
        manager.append([(seq_id, length)])
    memory.write(1, 0, list("abcdefgh"))
    manager.free(0)
    transfers = manager.append([(1, 1)])
    assert transfers == [Transfer("move", 4, 0, 8)]
    assert manager.slots_moved == 8
    memory.follow(transfers)
    assert memory.read(1, 8) == list("abcdefgh")
    manager.check_integrity()


def test_a_move_that_finds_no_room_changes_nothing() -> None:
    manager = SwappingManager(12, granule=4)
    for seq_id in range(3):
        manager.admit(seq_id, [0] * 4, 12)
        manager.append([(seq_id, 4)])
    manager.free(0)
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="no hole of 12 slots"):
        manager.append([(1, 8)])
    assert state_of(manager) == before
    manager.check_integrity()
    pool = RegionPool(12)
    assert [pool.allocate(4) for _ in range(3)] == [0, 4, 8]
    with pytest.raises(OutOfBlocks):
        pool.move(4, 4, 5)
    assert pool.holes == []


@pytest.mark.parametrize(("source", "destination"), [(2, 0), (0, 2), (1, 0), (0, 3)])
def test_storage_moves_rows_onto_their_own_place(source: int, destination: int) -> None:
    storage = KVCache(num_layers=2, num_blocks=8, block_size=1, num_kv_heads=1, head_size=2, dtype="float32")
    before = np.arange(2 * 2 * 8 * 2, dtype=np.float32).reshape(storage.device.shape)
    storage.device[:] = xp.asarray(before)
    storage.apply([Transfer("move", source, destination, 5)])
    after = to_host(storage.device)
    assert np.array_equal(after[:, :, destination : destination + 5], before[:, :, source : source + 5])


def test_the_scheduler_always_finds_someone_to_run_when_regions_are_scattered() -> None:
    """The first request ends, the second lies behind its hole and outgrows what is left: it must go on."""
    scheduler = Scheduler(SwappingManager(48, 48), max_batch_tokens=64, max_batch_seqs=4, preemption="swap")
    groups = [Group([Sequence(i, [0] * 8, 8, 8 + new)]) for i, new in enumerate((4, 40))]
    for group in groups:
        scheduler.add(group)
    while groups[1].status is not Status.FINISHED:
        plan = scheduler.schedule()
        assert plan.chunks
        for seq, num_tokens in plan.chunks:
            seq.num_computed += num_tokens
            seq.tokens.append(0)
            if len(seq.tokens) == seq.max_tokens:
                scheduler.finish(groups[seq.seq_id], seq)
    assert groups[1].num_preemptions == 0
    scheduler.manager.check_integrity()
