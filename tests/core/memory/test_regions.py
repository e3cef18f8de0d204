"""The region pool: first fit, growing, moving and joining, and the faults that its integrity check finds."""

from __future__ import annotations

import random

import pytest

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.regions import Region, RegionPool


def test_regions_are_first_fit_and_join_when_freed() -> None:
    pool = RegionPool(100)
    starts = [pool.allocate(25) for _ in range(4)]
    assert starts == [0, 25, 50, 75]
    pool.release(0, 25)
    pool.release(50, 25)
    with pytest.raises(OutOfBlocks, match="no hole of 26 slots: 50 free, in 2 holes"):
        pool.allocate(26)
    assert pool.allocate(20) == 0  # the first hole that is large enough
    pool.release(25, 25)
    assert pool.holes == [(20, 55)]


def test_a_move_that_finds_no_hole_changes_nothing() -> None:
    pool = RegionPool(12)
    assert [pool.allocate(4) for _ in range(3)] == [0, 4, 8]
    with pytest.raises(OutOfBlocks):
        pool.move(4, 4, 5)
    assert pool.holes == []


def test_a_region_grows_only_into_the_hole_behind_it() -> None:
    pool = RegionPool(12)
    for _ in range(3):
        pool.allocate(3)
    pool.release(3, 3)
    assert not pool.grow(6, 3, 4)  # the hole behind it has 3
    assert pool.grow(6, 3, 3)
    assert pool.grow(0, 3, 2)
    assert pool.holes == [(5, 1)]
    assert not pool.grow(6, 6, 1)  # at the end of the pool


def test_a_pool_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="num_slots is -1; at least 0 is needed"):
        RegionPool(-1)


def test_holes_that_are_too_small_are_told_apart() -> None:
    pool = RegionPool(20)
    for size in (4, 2, 8, 6):
        pool.allocate(size)
    pool.release(4, 2)
    pool.release(14, 6)
    assert pool.split_free(3) == (2, 6)
    assert pool.split_free(7) == (8, 0)
    assert pool.split_free(0) == (0, 8)


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
        pool.check_integrity(regions.values())
    assert refused > 100
    for region in regions.values():
        pool.release(region.start, region.size)
    assert pool.holes == [(0, 500)]


@pytest.mark.parametrize(
    ("regions", "holes", "message"),
    [
        ([Region(0, 4)], [(5, 5)], "slots 4 to 5 belong to nothing, or to two regions"),
        ([Region(0, 4), Region(3, 2)], [(5, 5)], "slots 4 to 3 belong to nothing, or to two regions"),
        ([Region(0, 4)], [(4, 5)], "regions and holes cover 9 of 10 slots"),
        ([Region(0, 4)], [(4, 3), (7, 3)], "two holes touch and were not joined"),
    ],
)
def test_integrity_finds_gaps_overlaps_and_holes_that_touch(
    regions: list[Region], holes: list[tuple[int, int]], message: str
) -> None:
    pool = RegionPool(10)
    pool.holes = holes
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(regions)
