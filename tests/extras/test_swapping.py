"""The swapping manager: regions that move, even onto themselves, and sequences that go to the host and come back."""

from __future__ import annotations

import pytest
from support.books import books
from support.shadow import ShadowMemory

from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.core.engine.sequence import Group, Sequence, Status
from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import OutOfHostBlocks, Transfer
from paged_ref.core.memory.usage import MemoryUsage
from paged_ref.extras.swapping import SwappingManager


def filled(num_slots: int, num_host_slots: int, lengths: list[int]) -> SwappingManager:
    """Sequences 0, 1, ... of these lengths."""
    manager = SwappingManager(num_slots, num_host_slots, alignment=4)
    for seq_id, length in enumerate(lengths):
        manager.admit(seq_id, [0] * length, 12)
        manager.append([(seq_id, length)])
    return manager


def test_a_sequence_that_is_alone_can_grow_wherever_it_lies() -> None:
    """Its own slots are part of the hole that it moves to; else it would wait for room that no sequence holds."""
    manager = filled(12, 0, [4, 8])
    memory = ShadowMemory(manager)
    memory.write(1, 0, list("abcdefgh"))
    manager.free(0)
    transfers = manager.append([(1, 1)])
    assert transfers == [Transfer("move", 4, 0, 8)]
    assert manager.slots_moved == 8
    memory.follow(transfers)
    assert memory.read(1, 8) == list("abcdefgh")
    manager.check_integrity()


def test_a_move_that_finds_no_room_changes_nothing() -> None:
    manager = filled(12, 0, [4, 4, 4])
    manager.free(0)
    before = books(manager)
    with pytest.raises(OutOfBlocks, match="no hole of 12 slots"):
        manager.append([(1, 8)])
    assert books(manager) == before
    assert manager.slots_moved == 0
    manager.check_integrity()


def test_an_append_of_several_is_all_or_none() -> None:
    """The first of the two could grow in place; since the second finds no room, neither does."""
    manager = filled(16, 0, [4, 4, 4])
    before = books(manager)
    for appends in ([(2, 1), (0, 1)], [(2, 4), (1, 5)]):
        with pytest.raises(OutOfBlocks):
            manager.append(appends)
        assert books(manager) == before
    assert manager.append([(2, 4), (0, 0)]) == []
    assert (manager.length(2), manager.length(0)) == (8, 4)


def test_several_sequences_travel_together() -> None:
    manager = filled(16, 12, [3, 4, 2])
    memory = ShadowMemory(manager)
    for seq_id, text in enumerate(("abc", "defg", "hi")):
        memory.write(seq_id, 0, list(text))
    out = manager.swap_out([2, 0])
    assert out == [Transfer("swap_out", 8, 0, 2), Transfer("swap_out", 0, 2, 3)]
    assert (list(manager.regions), list(manager.swapped)) == ([1], [2, 0])
    assert [manager.length(seq_id) for seq_id in range(3)] == [3, 4, 2]
    memory.follow(out)
    manager.admit(3, [0] * 8, 8)
    manager.append([(3, 8)])
    memory.write(3, 0, list("????????"))
    manager.free(3)
    back = manager.swap_in([0, 2])
    memory.follow(back)
    assert [memory.read(seq_id, manager.length(seq_id)) for seq_id in range(3)] == [
        list("abc"),
        list("defg"),
        ["h", "i"],
    ]
    assert manager.slots_swapped == 10
    assert manager.host_pool.holes == [(0, 12)]
    manager.check_integrity()


def test_swaps_of_several_are_all_or_none() -> None:
    manager = filled(12, 5, [4, 3, 4])
    before = books(manager)
    with pytest.raises(OutOfHostBlocks, match="host memory has no hole of 3 slots: 1 free, in 1 hole"):
        manager.swap_out([0, 1])
    assert books(manager) == before
    manager.swap_out([1])
    manager.admit(3, [0] * 4, 12)
    before = books(manager)
    with pytest.raises(OutOfBlocks, match="no hole of 4 slots: 0 free, in 0 holes"):
        manager.swap_in([1])
    assert books(manager) == before
    assert manager.slots_swapped == 3


def test_a_swapped_sequence_can_end_on_the_host() -> None:
    manager = filled(12, 8, [4, 4])
    manager.swap_out([0, 1])
    manager.free(0)
    manager.check_integrity()
    manager.free(1)
    assert manager.host_pool.holes == [(0, 8)]
    assert manager.snapshot().free == 12


def test_swapping_says_where_its_memory_went() -> None:
    manager = filled(16, 8, [3, 4, 4])
    manager.free(1)
    usage = manager.snapshot((5, 9)).usage({0: 9})
    assert usage == MemoryUsage(tokens=7, reserved=1, internal=0, external=8, cached=0, free=0)  # two holes of 4 each
    assert manager.snapshot((4, 9)).usage({0: 9}).free == 8
    assert manager.max_slots_needed(3, 9, n=2) == 12


@pytest.mark.parametrize("name", ["num_slots", "num_host_slots", "alignment"])
def test_a_swapping_manager_that_cannot_be(name: str) -> None:
    least = 0 if name == "num_host_slots" else 1
    with pytest.raises(ValueError, match=f"{name} is {least - 1}; at least {least} is needed"):
        SwappingManager(**{"num_slots": 4, name: least - 1})


def test_the_scheduler_always_finds_a_sequence_to_run_when_regions_are_scattered() -> None:
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
            if len(seq.tokens) == seq.max_len:
                scheduler.finish(groups[seq.seq_id], seq)
    assert groups[1].num_preemptions == 0
    scheduler.manager.check_integrity()
