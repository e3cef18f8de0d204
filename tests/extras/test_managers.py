"""Managers by their names: what is made, for the same pool of slots, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.regions import RegionPool
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.buddy import BuddyPool
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.managers import MANAGERS, make_manager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager


def make(name: Any, num_slots: int = 100, **options: Any) -> Any:
    return make_manager(name, num_slots, **{"max_model_len": 50, **options})


@pytest.mark.parametrize("name", MANAGERS)
def test_every_name_makes_a_manager_of_as_many_slots_as_fit(name: Any) -> None:
    manager: KVCacheManager = make(name)
    assert manager.num_slots == (96 if name == "paged" else 100)
    assert (manager.paged, manager.can_fork) == (name == "paged", name == "paged")
    manager.check_integrity()


def test_the_options_of_the_paged_manager() -> None:
    order = [3, 1, 2, 0]
    manager = make("paged", 18, block_size=4, free_order=order, num_host_slots=11, watermark=0.3)
    assert isinstance(manager, SwappablePagedManager)
    assert type(manager.pool) is BlockPool
    assert (manager.block_size, manager.pool.free_blocks, manager.watermark) == (4, order, 1)
    assert manager.host_pool.num_blocks == 2
    assert type(make("paged", prefix_cache=True).pool) is CachingBlockPool
    assert make("paged", 16 * 199).watermark == 1  # 1 % of the blocks, rounded down


def test_the_options_of_the_standard_manager() -> None:
    manager = make("standard", reserve="pow2")
    assert isinstance(manager, StandardManager)
    assert (manager.reserve, manager.max_model_len, type(manager.pool)) == ("pow2", 50, RegionPool)
    assert type(make("standard", allocator="buddy").pool) is BuddyPool


def test_the_options_of_the_swapping_manager() -> None:
    manager = make("swapping", num_host_slots=7)
    assert isinstance(manager, SwappingManager)
    assert manager.host_pool.num_slots == 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("buddy", {}, "manager is 'buddy'; known are paged, standard, swapping"),
        ("standard", {"allocator": "best fit"}, "allocator is 'best fit'; known are first fit, buddy"),
        ("standard", {"reserve": "half"}, "reserve is 'half'; known are max, pow2, exact"),
        ("standard", {"prefix_cache": True}, "prefix_cache is on; the standard manager cannot share, only paged can"),
        ("paged", {"watermark": 1.0}, "watermark is 1.0; 0 up to 1 is needed, a share of the blocks"),
        ("paged", {"watermark": -0.1}, "watermark is -0.1; 0 up to 1 is needed"),
        ("paged", {"block_size": 0}, "block_size is 0; at least 1 is needed"),
        ("paged", {"num_slots": 15}, "the KV cache has 15 slots; at least one block of 16 is needed"),
        ("standard", {"num_slots": 0}, "the KV cache has 0 slots; at least one block of 1 is needed"),
        ("paged", {"num_host_slots": -1}, "the host pool has room for -1 tokens; at least 0 is needed"),
        ("paged", {"free_order": [0, 1]}, "free_order must name each of the blocks 0 to 5 once"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)
