"""The block pool and the region pool: what they hand out, and what they refuse."""

from __future__ import annotations

import random

import pytest

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.regions import Region, RegionPool


def test_blocks_come_in_the_given_order_and_the_last_freed_comes_first() -> None:
    pool = BlockPool(9, free_order=[7, 1, 3, 0, 2, 4, 5, 6, 8])
    assert [pool.allocate() for _ in range(3)] == [7, 1, 3]
    assert pool.release(1)
    assert pool.free_blocks[:2] == [1, 0]
    assert pool.allocate() == 1


def test_a_shared_block_is_free_when_the_last_table_lets_go() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    assert not pool.release(block)
    assert pool.num_free == 1
    assert pool.release(block)
    assert pool.num_free == 2


def test_an_empty_pool_says_so() -> None:
    pool = BlockPool(1)
    pool.allocate()
    with pytest.raises(OutOfBlocks, match="none of the 1 blocks is free"):
        pool.allocate()


def test_a_block_in_no_table_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="block 0 is in no table"):
        BlockPool(1).release(0)


@pytest.mark.parametrize(("num_blocks", "order"), [(-1, None), (2, [0, 0]), (2, [0]), (2, [0, 2])])
def test_a_pool_that_cannot_be(num_blocks: int, order: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"num_blocks|free_order"):
        BlockPool(num_blocks, order)


def test_integrity_finds_a_wrong_count() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.check_integrity([block])
    with pytest.raises(AssertionError, match=f"block {block} has ref_count 1; 2 tables"):
        pool.check_integrity([block, block])
    with pytest.raises(AssertionError, match="0 tables"):
        pool.check_integrity([])
    pool.release(block, keep_idle=True)
    pool.check_integrity([], idle=[block])
    with pytest.raises(AssertionError, match=r"2 free \+ 0 held \+ 0 cached"):
        pool.check_integrity([])


def test_regions_are_first_fit_and_join_when_freed() -> None:
    pool = RegionPool(100)
    starts = [pool.allocate(25) for _ in range(4)]
    assert starts == [0, 25, 50, 75]
    pool.release(0, 25)
    pool.release(50, 25)
    with pytest.raises(OutOfBlocks, match="no hole of 26 slots; 50 are free, in 2 holes"):
        pool.allocate(26)
    assert pool.allocate(20) == 0  # the first hole that is large enough
    pool.release(25, 25)
    assert pool.holes == [(20, 55)]


def test_random_regions_never_overlap_and_never_leak() -> None:
    rng = random.Random(0)
    pool = RegionPool(500)
    regions: dict[int, Region] = {}
    refused = 0
    for step in range(5000):
        if regions and rng.random() < 0.2:
            region = rng.choice(list(regions.values()))
            if pool.grow(region.start, region.size, 7):
                region.size += 7
        elif regions and rng.random() < 0.5:
            region = regions.pop(rng.choice(list(regions)))
            pool.release(region.start, region.size)
        else:
            size = rng.randrange(1, 60)
            try:
                regions[step] = Region(pool.allocate(size), size)
            except OutOfBlocks:
                refused += 1
                assert max((hole for _, hole in pool.holes), default=0) < size
        pool.check_integrity(regions)
    assert refused > 100
    for region in regions.values():
        pool.release(region.start, region.size)
    assert pool.holes == [(0, 500)]
