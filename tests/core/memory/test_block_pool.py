"""The block pool: what it hands out, what it refuses, and the faults that its integrity check finds."""

from __future__ import annotations

import pytest

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks


def test_blocks_come_in_the_given_order_and_the_last_freed_comes_first() -> None:
    pool = BlockPool(9, free_order=[7, 1, 3, 0, 2, 4, 5, 6, 8])
    assert [pool.allocate() for _ in range(3)] == [7, 1, 3]
    pool.release(1)
    assert pool.free_blocks[:2] == [1, 0]
    assert pool.allocate() == 1


def test_a_shared_block_is_free_when_the_last_table_lets_go() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    pool.release(block)
    assert (pool.num_free, pool.ref_count[block]) == (1, 1)
    pool.release(block)
    assert (pool.num_free, pool.ref_count[block]) == (2, 0)


def test_an_empty_pool_says_so() -> None:
    pool = BlockPool(1)
    pool.allocate()
    with pytest.raises(OutOfBlocks, match="no block is free; the pool has 1"):
        pool.allocate()


def test_a_block_in_no_table_cannot_be_released() -> None:
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="block 0 is in no table"):
        pool.release(0)
    pool.check_integrity([])


@pytest.mark.parametrize(("num_blocks", "order"), [(-1, None), (2, [0, 0]), (2, [0]), (2, [0, 2])])
def test_a_pool_that_cannot_be(num_blocks: int, order: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"num_blocks|free_order"):
        BlockPool(num_blocks, order)


def test_the_plain_pool_remembers_nothing_of_its_blocks() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.filled([block], 1, [1, 2], 2)
    assert pool.lookup([1, 2], 2) == []
    pool.release(block)
    assert pool.lookup([1, 2], 2) == []
    assert pool.num_cached == 0


def test_integrity_finds_a_wrong_count() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.check_integrity([block])
    with pytest.raises(AssertionError, match=f"block {block} has ref_count 1 and 2 table entries"):
        pool.check_integrity([block, block])
    with pytest.raises(AssertionError, match="0 table entries"):
        pool.check_integrity([])


def test_integrity_finds_a_block_that_is_lost_and_one_that_is_free_and_held() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.ref_count[block] = 0  # in no table, and not in the free list
    with pytest.raises(AssertionError, match=r"2 free or cached \+ 0 held blocks are not each of the 3 blocks once"):
        pool.check_integrity([])
    pool = BlockPool(3)
    pool.ref_count[0] = 1  # held, and still in the free list
    with pytest.raises(AssertionError, match=r"3 free or cached \+ 1 held blocks are not each of the 3 blocks once"):
        pool.check_integrity([0])
