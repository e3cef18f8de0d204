"""The one protocol of memory: what every manager says of itself, refuses, and gives back."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager, OutOfHostBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.swapping import SwappingManager


def test_a_manager_says_what_it_can() -> None:
    managers: list[tuple[KVCacheManager, Any]] = [
        (PagedManager(BlockPool(4), 4), (True, 4, 16, True, False)),
        (SwappablePagedManager(BlockPool(4), 4, 2), (True, 4, 16, True, True)),
        (StandardManager(16, 16), (False, 1, 16, False, False)),
        (SwappingManager(16), (False, 1, 16, False, True)),
    ]
    for manager, expected in managers:
        said = (manager.paged, manager.block_size, manager.num_slots, manager.can_fork, manager.can_swap)
        assert said == expected


def test_what_a_manager_cannot_do_is_refused_by_its_name() -> None:
    standard, paged = StandardManager(16, 16), PagedManager(BlockPool(4), 4)
    standard.admit(0, [0], 4)
    paged.admit(0, [0], 4)
    with pytest.raises(NotImplementedError, match="StandardManager cannot share slots"):
        standard.fork(0, 1)
    for manager in (standard, paged):
        for operation in (manager.swap_out, manager.swap_in):
            with pytest.raises(NotImplementedError, match=f"{type(manager).__name__} cannot swap"):
                operation([0])


def test_a_full_host_is_also_out_of_blocks() -> None:
    assert issubclass(OutOfHostBlocks, OutOfBlocks)


@pytest.mark.parametrize("kind", ["paged", "max", "pow2", "exact", "swapping"])
@pytest.mark.parametrize("seed", range(3))
def test_random_lives(kind: str, seed: int) -> None:
    """Random admissions, appends, forks and ends: no slot has two owners, and at the end nothing is held."""
    rng = random.Random(seed)
    manager: KVCacheManager
    if kind == "paged":
        order = list(range(24))
        rng.shuffle(order)
        manager = PagedManager(BlockPool(24, order), 4)
    elif kind == "swapping":
        manager = SwappingManager(96, alignment=4)
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
            elif choice < 0.85 and manager.can_fork:
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
