"""The standard manager: what it reserves, what it refuses, and where the memory went."""

from __future__ import annotations

from typing import Any

import pytest
from support.books import books

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.standard import Reserve, StandardManager
from paged_ref.core.memory.usage import MemoryUsage


@pytest.mark.parametrize(("reserve", "size"), [("max", 64), ("pow2", 26), ("exact", 20)])
def test_what_the_reservations_reserve(reserve: Reserve, size: int) -> None:
    """A prompt of 10 that grows to 20: everything, 10 + 16, or just 20."""
    manager = StandardManager(128, 64, reserve)
    assert manager.region_size(10, 20) == size
    assert manager.max_slots_needed(10, 20) == size
    assert manager.max_slots_needed(10, 20, n=3) == size  # samples are sequences that can take turns


def test_standard_slots_are_one_run() -> None:
    manager = StandardManager(128, 64)
    manager.admit(0, [0] * 10, 20)
    manager.admit(1, [0] * 10, 20)
    assert manager.append([(1, 10)]) == []
    assert manager.placement(1) == [64]
    assert manager.slots(1, 8, 2) == [72, 73]
    before = books(manager)
    with pytest.raises(OutOfBlocks, match="no hole of 64 slots"):
        manager.admit(2, [0] * 1, 2)
    assert books(manager) == before
    manager.free(0)
    manager.admit(2, [0] * 1, 2)
    assert manager.placement(2) == [0]
    manager.check_integrity()


def test_standard_refuses_more_than_its_region() -> None:
    manager = StandardManager(64, 64, "exact")
    for seq_id in range(2):
        manager.admit(seq_id, [0] * 3, 5)
    manager.append([(0, 5)])
    before = books(manager)
    with pytest.raises(ValueError, match="5 of 5 reserved slots"):
        manager.append([(1, 2), (0, 1)])
    assert books(manager) == before  # none of the two has grown


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


def test_integrity_finds_a_region_that_is_too_full() -> None:
    manager = StandardManager(64, 64, "exact")
    manager.admit(0, [0] * 3, 5)
    manager.regions[0].length = 6
    with pytest.raises(AssertionError, match="sequence 0 of length 6 has a region of 5"):
        manager.check_integrity()
