"""Swapping in blocks: what travels, how often, and what is refused."""

from __future__ import annotations

import pytest
from support.books import books
from support.shadow import ShadowMemory

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.manager import OutOfHostBlocks, Transfer
from paged_ref.extras.host_swap import SwappablePagedManager


def swappable(num_blocks: int, num_host_blocks: int, watermark: int = 0) -> SwappablePagedManager:
    return SwappablePagedManager(BlockPool(num_blocks), 4, num_host_blocks, watermark)


def begin(manager: SwappablePagedManager, seq_id: int, length: int) -> None:
    manager.admit(seq_id, [0] * length, 24)
    manager.append([(seq_id, length)])


def test_a_block_that_several_share_travels_once_and_is_shared_there() -> None:
    manager = swappable(6, 4)
    begin(manager, 0, 9)
    manager.fork(0, 1)
    manager.append([(0, 1), (1, 1)])  # a copy of the last block: 4 blocks for 6 table entries
    out = manager.swap_out([0, 1])
    assert len(out) == 4
    assert {transfer.kind for transfer in out} == {"swap_out"}
    assert len({transfer.source for transfer in out}) == len({transfer.destination for transfer in out}) == 4
    assert manager.swapped[0].blocks[:2] == manager.swapped[1].blocks[:2]
    assert sorted(manager.host_pool.ref_count) == [1, 1, 2, 2]
    assert (manager.pool.num_free, manager.tables) == (6, {})
    manager.check_integrity()
    back = manager.swap_in([1, 0])
    assert len(back) == 4
    assert manager.tables[0].blocks[:2] == manager.tables[1].blocks[:2]
    assert manager.snapshot().shared == 2 * 4
    assert (manager.host_pool.num_free, manager.swapped) == (4, {})
    manager.check_integrity()


def test_a_block_that_several_share_needs_room_once_in_both_directions() -> None:
    """4 blocks in 6 table entries, and 4 places on each side: counted twice, they would not fit."""
    manager = swappable(4, 4)
    begin(manager, 0, 9)
    manager.fork(0, 1)
    manager.append([(0, 1), (1, 1)])
    assert len(manager.swap_out([0, 1])) == 4
    assert (manager.pool.num_free, manager.host_pool.num_free) == (4, 0)
    assert len(manager.swap_in([0, 1])) == 4
    assert (manager.pool.num_free, manager.host_pool.num_free) == (0, 4)
    manager.check_integrity()


def test_a_block_that_is_shared_with_a_sequence_that_stays_is_copied() -> None:
    manager = swappable(4, 4)
    begin(manager, 0, 8)
    manager.fork(0, 1)
    memory = ShadowMemory(manager)
    memory.write(0, 0, list("abcdefgh"))
    memory.follow(manager.swap_out([1]))
    assert manager.pool.ref_count[:2] == [1, 1]
    assert memory.read(1, 8) == memory.read(0, 8) == list("abcdefgh")
    memory.follow(manager.swap_in([1]))
    assert not set(manager.placement(0)) & set(manager.placement(1))
    assert memory.read(1, 8) == list("abcdefgh")


def test_tables_go_out_and_come_back_with_their_contents() -> None:
    manager = swappable(3, 3)
    begin(manager, 0, 6)
    memory = ShadowMemory(manager)
    memory.write(0, 0, list("abcdef"))
    out = manager.swap_out([0])
    assert out == [Transfer("swap_out", 0, 0), Transfer("swap_out", 1, 1)]
    assert manager.length(0) == 6
    memory.follow(out)
    begin(manager, 1, 12)
    memory.write(1, 0, list("????????????"))
    manager.free(1)
    memory.follow(manager.swap_in([0]))
    assert memory.read(0, 6) == list("abcdef")
    manager.check_integrity()


def test_swaps_of_several_are_all_or_none() -> None:
    manager = swappable(4, 3)
    begin(manager, 0, 8)
    begin(manager, 1, 8)
    before = books(manager)
    with pytest.raises(OutOfHostBlocks, match="no room for 4 blocks on the host: 3 free"):
        manager.swap_out([0, 1])
    assert books(manager) == before
    manager.swap_out([1])
    begin(manager, 2, 4)
    before = books(manager)
    with pytest.raises(OutOfBlocks, match="to swap in, no room for 2 blocks: 1 available"):
        manager.swap_in([1])
    assert books(manager) == before


def test_a_swapped_sequence_can_end_on_the_host() -> None:
    manager = swappable(4, 4)
    begin(manager, 0, 6)
    manager.fork(0, 1)
    manager.swap_out([0, 1])
    manager.free(0)
    manager.check_integrity()
    assert manager.host_pool.num_free == 2
    manager.free(1)
    manager.check_integrity()
    assert (manager.host_pool.num_free, manager.pool.num_free) == (4, 4)


def test_a_sequence_that_has_the_device_alone_may_take_all_of_it_past_the_watermark() -> None:
    """Sequences on the host hold nothing on the device: nothing is kept for them, or none could begin."""
    manager = swappable(4, 1, watermark=1)
    begin(manager, 0, 4)
    with pytest.raises(OutOfBlocks, match="no room for 3 blocks: 3 available, 1 of these spare"):
        manager.admit(1, [0] * 12, 12)
    manager.swap_out([0])
    assert manager.admit(1, [0] * 16, 16) == 0
    manager.append([(1, 16)])
    manager.free(1)
    manager.swap_in([0])
    manager.check_integrity()


def test_integrity_sees_the_host_pool_too() -> None:
    manager = swappable(4, 4)
    begin(manager, 0, 6)
    manager.swap_out([0])
    manager.swapped[0].blocks.pop()
    with pytest.raises(AssertionError, match="block 1 has ref_count 1 and 0 table entries"):
        manager.check_integrity()


def test_a_host_pool_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="num_blocks is -1; at least 0 is needed"):
        swappable(4, -1)


def test_coming_back_leaves_what_the_scheduler_asks_for() -> None:
    manager = swappable(4, 2)
    begin(manager, 0, 4)
    begin(manager, 1, 8)
    manager.swap_out([1])
    with pytest.raises(OutOfBlocks, match="to swap in, no room for 2 blocks: 3 available, 2 of these spare"):
        manager.swap_in([1], spare=5)
    manager.check_integrity()
    assert len(manager.swap_in([1], spare=4)) == 2
