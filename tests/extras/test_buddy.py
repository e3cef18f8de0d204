"""Buddy allocation: pieces that are powers of two, aligned, split and joined again."""

from __future__ import annotations

import random

import pytest

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.regions import Region
from paged_ref.core.memory.standard import StandardManager
from paged_ref.core.memory.usage import PartialAllocation
from paged_ref.extras.buddy import BuddyPool
from paged_ref.extras.managers import make_manager


def test_a_region_takes_the_smallest_piece_that_holds_it() -> None:
    pool = BuddyPool(16)
    assert pool.allocate(3) == 0  # a piece of 4
    assert pool.allocate(4) == 4
    assert pool.allocate(1) == 8
    with pytest.raises(OutOfBlocks, match="no piece of 8 slots for 5"):
        pool.allocate(5)
    assert pool.split_free(5) == (7, 0)  # 1 + 2 + 4, all too small for a piece of 8
    assert pool.split_free(4) == (3, 4)
    pool.release(8, 1)
    assert pool.allocate(5) == 8  # the halves have joined
    for start, size in ((0, 3), (4, 4), (8, 5)):
        pool.release(start, size)
    assert pool.free[16] == {0}


@pytest.mark.parametrize(("num_slots", "regions"), [(15_805, 7), (2048, 1), (2047, 0), (16_384, 8)])
def test_a_pool_need_not_be_a_power_of_two(num_slots: int, regions: int) -> None:
    pool = BuddyPool(num_slots)
    pool.check_integrity([])
    starts = []
    while True:
        try:
            starts.append(pool.allocate(2048))
        except OutOfBlocks:
            break
    assert len(starts) == regions
    assert all(start % 2048 == 0 for start in starts)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_keep_the_pieces_in_order(seed: int) -> None:
    rng = random.Random(seed)
    pool = BuddyPool(rng.randint(1, 300))
    regions: dict[int, Region] = {}
    refused = 0
    for number in range(1500):
        if regions and rng.random() < 0.5:
            region = regions.pop(rng.choice(list(regions)))
            pool.release(region.start, region.size)
        else:
            size = rng.randint(1, 40)
            try:
                regions[number] = Region(pool.allocate(size), size)
            except OutOfBlocks:
                refused += 1
                assert all(not starts for piece, starts in pool.free.items() if piece >= size)
        pool.check_integrity(regions.values())
        assert sum(pool.split_free(0)) + sum(pool.slots_taken(r.size) for r in regions.values()) == pool.num_slots
    assert refused
    for region in regions.values():
        pool.release(region.start, region.size)
    assert pool.free == BuddyPool(pool.num_slots).free


def test_the_standard_manager_counts_what_is_rounded_up_as_external() -> None:
    manager = StandardManager(64, 64, "exact", BuddyPool(64))
    manager.admit(0, [0] * 10, 20)  # a piece of 32
    manager.append([(0, 10)])
    usage = manager.snapshot((30, 40)).usage({0: 20})
    assert (usage.tokens, usage.reserved, usage.internal) == (10, 10, 0)
    assert (usage.external, usage.free) == (12 + 32, 0)  # rounded up, and a piece that is too small for the next
    assert manager.partial_allocations() == [PartialAllocation(0, 10, 10, 20)]  # 10 more will be used
    assert manager.max_slots_needed(10, 33) == 64
    manager.check_integrity()


def test_an_unknown_allocator_is_refused() -> None:
    with pytest.raises(ValueError, match="allocator is 'best fit'; known are first fit, buddy"):
        make_manager("standard", 64, max_model_len=64, allocator="best fit")  # type: ignore[arg-type]
