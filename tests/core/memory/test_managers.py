"""The managers: who holds which slot, what is refused, and where the memory went."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import Forkable, KVCacheManager, Swappable, Transfer
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.core.memory.swapping import SwappingManager
from paged_ref.core.memory.usage import MemoryUsage


def test_all_are_managers_and_only_paged_can_share() -> None:
    assert isinstance(PagedManager(4, 4), KVCacheManager)
    assert isinstance(StandardManager(16, 16), KVCacheManager)
    assert isinstance(PagedManager(4, 4), Forkable)
    assert isinstance(SwappingManager(16), Swappable)
    for contiguous in (StandardManager(16, 16), SwappingManager(16)):
        assert isinstance(contiguous, KVCacheManager)
        assert not isinstance(contiguous, Forkable)


# --- paged ---------------------------------------------------------------------------------------------


def test_the_papers_figure_6() -> None:
    """Kwon et al. 2023, Fig. 6: 7 prompt tokens in blocks 7 and 1, then one token each, then block 3."""
    manager = PagedManager(9, 4, free_order=[7, 1, 3, 0, 2, 4, 5, 6, 8])
    manager.admit(0, [0] * 7, 100)
    assert manager.append([(0, 7)]) == []
    assert manager.block_table(0) == [7, 1]
    assert manager.slots(0, 0, 7) == [28, 29, 30, 31, 4, 5, 6]
    manager.append([(0, 1)])
    assert manager.block_table(0) == [7, 1]
    assert manager.slots(0, 7, 1) == [7]
    manager.append([(0, 1)])
    assert manager.block_table(0) == [7, 1, 3]
    assert manager.slots(0, 8, 1) == [12]


def test_the_papers_figure_8_copy_on_write() -> None:
    """Two samples share the prompt; the first to write copies its last block, the second writes in place."""
    manager = PagedManager(9, 4, free_order=[7, 1, 3, 0, 2, 4, 5, 6, 8])
    manager.admit(1, [0] * 7, 100)
    manager.append([(1, 7)])
    manager.fork(1, 2)
    assert manager.block_table(1) == manager.block_table(2) == [7, 1]
    assert (manager.pool.ref_count[7], manager.pool.ref_count[1]) == (2, 2)
    assert manager.append([(1, 1)]) == [Transfer("copy", 1, 3)]
    assert manager.block_table(1) == [7, 3]
    assert (manager.pool.ref_count[7], manager.pool.ref_count[1], manager.pool.ref_count[3]) == (2, 1, 1)
    assert manager.append([(2, 1)]) == []
    assert manager.block_table(2) == [7, 1]
    manager.check_integrity()


def test_a_full_shared_block_is_not_copied() -> None:
    manager = PagedManager(4, 4)
    manager.admit(0, [0] * 4, 8)
    manager.append([(0, 4)])
    manager.fork(0, 1)
    assert manager.append([(1, 1)]) == []
    assert manager.block_table(1)[0] == manager.block_table(0)[0]


def test_a_refused_append_changes_nothing() -> None:
    manager = PagedManager(2, 4)
    manager.admit(0, [0] * 6, 100)
    manager.append([(0, 6)])
    manager.fork(0, 1)
    before = (manager.block_table(0).copy(), manager.block_table(1).copy(), list(manager.pool.ref_count))
    for seq_id, num_tokens in ((0, 1), (1, 2), (0, 3)):  # a copy, a copy, a copy and a new block
        with pytest.raises(OutOfBlocks):
            manager.append([(seq_id, num_tokens)])
        assert (manager.block_table(0), manager.block_table(1), manager.pool.ref_count) == before
        assert manager.length(seq_id) == 6
    manager.check_integrity()


def test_a_refused_admission_changes_nothing() -> None:
    manager = PagedManager(2, 4)
    with pytest.raises(OutOfBlocks, match="9 tokens need 3 blocks; 2 can be had"):
        manager.admit(0, [0] * 9, 9)
    manager.admit(0, [0] * 8, 8)


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_must_be_positive(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size is {block_size}; at least 1"):
        PagedManager(4, block_size)


def test_paged_wastes_only_in_last_blocks() -> None:
    manager = PagedManager(10, 4)
    for seq_id, length in ((0, 6), (1, 4)):
        manager.admit(seq_id, [0] * length, 20)
        manager.append([(seq_id, length)])
    usage = manager.snapshot().usage({0: 7})
    assert usage == MemoryUsage(tokens=10, reserved=1, internal=1, external=0, cached=0, free=28)
    manager.fork(0, 2)
    assert manager.snapshot().usage({0: 7}).shared == 8
    assert manager.snapshot().usage({0: 7}).total == manager.num_slots


# --- standard ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reserve", "size"), [("max", 64), ("pow2", 26), ("exact", 20)])
def test_what_the_reservations_reserve(reserve: str, size: int) -> None:
    """A prompt of 10 that grows to 20: everything, 10 + 16, or just 20."""
    assert StandardManager(128, 64, reserve).region_size(10, 20) == size  # type: ignore[arg-type]


def test_standard_slots_are_one_run() -> None:
    manager = StandardManager(128, 64)
    manager.admit(0, [0] * 10, 20)
    manager.admit(1, [0] * 10, 20)
    manager.append([(1, 10)])
    assert manager.start(1) == 64
    assert manager.slots(1, 8, 2) == [72, 73]
    with pytest.raises(OutOfBlocks, match="no hole of 64 slots"):
        manager.admit(2, [0] * 1, 2)
    manager.free(0)
    manager.admit(2, [0] * 1, 2)
    assert manager.start(2) == 0
    manager.check_integrity()


def test_standard_refuses_more_than_its_region() -> None:
    manager = StandardManager(64, 64, "exact")
    manager.admit(0, [0] * 3, 5)
    manager.append([(0, 5)])
    with pytest.raises(ValueError, match="5 of 5 reserved slots"):
        manager.append([(0, 1)])


def test_standard_says_where_its_memory_went() -> None:
    manager = StandardManager(200, 64)
    manager.admit(0, [0] * 10, 20)
    manager.append([(0, 10)])
    usage = manager.snapshot().usage({0: 20})
    assert usage == MemoryUsage(tokens=10, reserved=10, internal=44, external=0, cached=0, free=136)
    manager.admit(1, [0] * 10, 20)
    manager.admit(2, [0] * 10, 20)
    assert manager.snapshot().usage({0: 20}).external == 8  # 200 - 3 * 64: too small for a fourth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 64), "reserves max_model_len = 64 slots .* has 32"),
        ((64, 0), "max_model_len is 0"),
        ((64, 64, "half"), "reserve is 'half'; known are max, pow2, exact"),
    ],
)
def test_a_standard_manager_that_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StandardManager(*arguments)


# --- all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["paged", "max", "pow2", "exact"])
@pytest.mark.parametrize("seed", range(3))
def test_random_lives(kind: str, seed: int) -> None:
    """Random admissions, appends, forks and ends: no slot has two owners, and at the end nothing is held."""
    rng = random.Random(seed)
    manager: KVCacheManager
    if kind == "paged":
        order = list(range(24))
        rng.shuffle(order)
        manager = PagedManager(24, 4, free_order=order)
    else:
        manager = StandardManager(96, 24, kind)  # type: ignore[arg-type]
    alive: dict[int, int] = {}  # seq_id -> length at most
    next_id = refused = 0
    for _ in range(3000):
        choice = rng.random()
        try:
            if choice < 0.3 or not alive:
                prompt, longest = rng.randrange(1, 12), rng.randrange(12, 25)
                manager.admit(next_id, [0] * prompt, longest)
                alive[next_id] = longest
                next_id += 1
            elif choice < 0.75:
                seq_id = rng.choice(list(alive))
                room = alive[seq_id] - manager.length(seq_id)
                manager.append([(seq_id, rng.randrange(0, min(5, room) + 1))])
            elif choice < 0.85 and isinstance(manager, Forkable):
                seq_id = rng.choice(list(alive))
                manager.fork(seq_id, next_id)
                alive[next_id] = alive[seq_id]
                next_id += 1
            else:
                seq_id = rng.choice(list(alive))
                del alive[seq_id]
                manager.free(seq_id)
        except OutOfBlocks:
            refused += 1
        manager.check_integrity()
        assert manager.snapshot().usage(alive).total == manager.num_slots
    assert refused
    for seq_id in alive:
        manager.free(seq_id)
    manager.check_integrity()
    assert manager.snapshot().free == manager.num_slots
